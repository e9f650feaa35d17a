"""Each transition of a record, on a real Redis: who wins when requests, workers and messages race."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from uuid import uuid4

import pytest
import redis
import redis.asyncio

from app.engine.state import AsyncTaskStore, Message, Status, TaskStore, error_document, record_key
from tests.integration.harness import Stack

pytestmark = pytest.mark.integration

DATABASE = 5  # not the one that the stack's processes use
ERROR = error_document("not_published", "why")


@pytest.fixture
def url(stack: Stack) -> str:
    return stack.settings.redis_url.get_secret_value().removesuffix("0") + str(DATABASE)


@pytest.fixture
async def store(url: str) -> AsyncIterator[AsyncTaskStore]:
    client = redis.asyncio.Redis.from_url(url, decode_responses=True)
    await client.flushdb()
    yield AsyncTaskStore(client, queue_max=3, backlog_max=3, result_ttl=60)
    await client.aclose()


@pytest.fixture
def worker(url: str) -> Iterator[TaskStore]:
    with redis.Redis.from_url(url, decode_responses=True) as client:
        yield TaskStore(client, celery_result_ttl=60)


def message(**fields: object) -> Message:
    return replace(
        Message(str(uuid4()), "light.count_words", "light", {"text": "a"}, "digest", "request", publish=uuid4().hex),
        **fields,
    )


def again(one: Message) -> Message:
    """The same request once more: all but the publish is equal."""
    return replace(one, publish=uuid4().hex)


def started(worker: TaskStore, one: Message) -> Message:
    """The message as its run, which must be allowed, knows it."""
    answer = worker.start(one, "w")
    assert answer.outcome == "run"
    return replace(one, run=answer.run)


async def status(store: AsyncTaskStore, one: Message) -> str | None:
    return (await store.record(one.task_id)).get("status")


async def made(store: AsyncTaskStore, **fields: object) -> Message:
    one = message(**fields)
    created = await store.create(one, lease=10)
    assert created.outcome == "created"
    return replace(one, epoch=created.epoch, created_at=created.created_at)


async def test_a_request_meets_what_an_earlier_one_left(store: AsyncTaskStore) -> None:
    one = await made(store)
    meeting = await store.create(again(one), lease=10)
    assert meeting.outcome == "leased"
    assert 9 < meeting.lease_left <= 10
    await store.confirm(one)
    assert (await store.create(again(one), lease=10)).outcome == "exists"
    assert (await store.create(replace(one, digest="other"), lease=10)).outcome == "conflict"


async def test_a_lease_that_ran_out_is_taken_over(store: AsyncTaskStore) -> None:
    one = message()
    assert (await store.create(one, lease=0)).outcome == "created"
    two = again(one)
    assert (await store.create(two, lease=10)).outcome == "created"
    # The first one's outcome no longer counts.
    await store.confirm(one)
    assert await store.withdraw(one, certain=True, error=ERROR) is Status.PENDING
    assert (await store.create(again(one), lease=10)).outcome == "leased"
    # Its message may be on the broker all the same: the record must stay, so that the message finds it void.
    assert await store.withdraw(two, certain=True, error=ERROR) is None
    assert await status(store, two) == Status.FAILURE


async def test_what_the_broker_refused_leaves_nothing(store: AsyncTaskStore) -> None:
    one = await made(store)
    assert await store.withdraw(one, certain=True, error=ERROR) is None
    assert await store.redis.dbsize() == 0


async def test_what_nobody_confirmed_fails_and_can_be_sent_again(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = await made(store)
    assert await store.withdraw(one, certain=False, error=ERROR) is None
    assert worker.start(one, "w").outcome == "dead"
    reopened = await store.create(again(one), lease=10)
    assert (reopened.outcome, reopened.epoch) == ("created", 2)
    assert worker.start(one, "w").outcome == "stale"
    assert worker.start(replace(again(one), epoch=2), "w").outcome == "run"


async def test_a_worker_that_was_faster_than_the_confirm_wins(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = await made(store)
    assert worker.start(one, "w").outcome == "run"
    assert await store.withdraw(one, certain=False, error=ERROR) is Status.STARTED


async def test_a_redelivery_takes_over_and_a_second_publish_does_not(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = await made(store)
    first = started(worker, one)
    assert worker.start(again(one), "w").outcome == "duplicate"
    second = started(worker, one)
    assert (await store.record(one.task_id))["attempts"] == "2"
    # The worker that was thought dead comes back.
    assert worker.progress(first, 1, 2) == "lost"
    assert worker.retry(first, 5, ERROR) == "lost"
    assert worker.finish(first, Status.FAILURE, b"{}", "{}") == "lost"
    assert worker.finish(second, Status.SUCCESS, b'"done"', "{}") == Status.SUCCESS
    repeated = worker.start(again(one), "w")
    assert (repeated.outcome, repeated.result) == ("stored", "done")


async def test_a_run_that_was_taken_over_changes_nothing_more(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = await made(store)
    worker.start(one, "w")
    assert worker.retry(one, 5, ERROR) == "RETRY"
    following = replace(again(one), retries=1)
    assert worker.start(following, "w").outcome == "run"
    assert worker.progress(one, 1, 2) == "lost"
    assert worker.retry(one, 5, ERROR) == "lost"
    assert worker.finish(one, Status.SUCCESS, b"1", "{}") == "lost"
    assert worker.progress(following, 1, 2) == "go"
    assert worker.finish(following, Status.FAILURE, b"{}", "{}") == Status.FAILURE
    assert worker.finish(following, Status.SUCCESS, b"1", "{}") == "lost"
    assert await status(store, one) == Status.FAILURE


async def test_an_old_message_after_the_retry_was_written_publishes_it_again(
    store: AsyncTaskStore, worker: TaskStore
) -> None:
    one = await made(store)
    worker.start(one, "w")
    worker.retry(one, 5, ERROR)
    redelivered = worker.start(one, "w")
    assert (redelivered.outcome, redelivered.retries) == ("republish", 1)
    assert 4 < redelivered.due_in <= 5
    worker.start(replace(again(one), retries=1), "w")
    assert worker.start(one, "w").outcome == "stale"


async def test_a_call_that_is_repeated_is_answered_like_the_first(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = message()
    first, second = [await store.create(one, lease=10) for _ in range(2)]
    assert first == second
    await store.confirm(one)
    await store.confirm(one)
    run = started(worker, one)
    assert [worker.retry(run, 5, ERROR) for _ in range(2)] == ["RETRY", "RETRY"]
    assert (await store.record(one.task_id))["retries"] == "1"
    for certain in (True, False):
        refused = await made(store)
        assert [await store.withdraw(refused, certain=certain, error=ERROR) for _ in range(2)] == [None, None]


async def test_a_parent_that_knows_no_run_ends_the_one_that_is_there(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = await made(store)
    started(worker, one)
    assert worker.finish(one, Status.FAILURE, b"{}", "{}") == Status.FAILURE


async def test_what_was_never_published_holds_no_place_past_its_lease(store: AsyncTaskStore) -> None:
    for _ in range(3):
        await store.create(message(), lease=0)
    confirmed = [await made(store) for _ in range(3)]
    for one in confirmed:
        await store.confirm(one)
    assert (await store.create(message(), lease=10)).outcome == "full"


async def test_a_cancelled_run_whose_worker_died_does_not_start_again(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = await made(store)
    started(worker, one)
    await store.cancel(one.task_id, "light")
    assert worker.start(one, "w").outcome == "dead"
    assert await status(store, one) == Status.CANCELLED


async def test_a_task_that_nobody_knows_is_ended_by_its_id(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = await made(store)
    worker.fail(one.task_id, ERROR)
    worker.fail("unknown", ERROR)
    assert await status(store, one) == Status.FAILURE


async def test_cancel_in_every_state(store: AsyncTaskStore, worker: TaskStore) -> None:
    assert await store.cancel("unknown", "light") is None
    waiting = await made(store)
    assert await store.cancel(waiting.task_id, "light") == "CANCELLED"
    assert worker.start(waiting, "w").outcome == "dead"
    running = await made(store)
    worker.start(running, "w")
    assert await store.cancel(running.task_id, "light") == "CANCELLING"
    assert worker.progress(running, 1, 2) == "cancel"
    assert worker.retry(running, 1, ERROR) == "CANCELLED"
    ended = await made(store)
    worker.start(ended, "w")
    worker.finish(ended, Status.SUCCESS, b"1", "{}")
    assert await store.cancel(ended.task_id, "light") == "SUCCESS"


async def test_a_full_queue_and_a_full_archive_stream_refuse(store: AsyncTaskStore, worker: TaskStore) -> None:
    waiting = [await made(store) for _ in range(3)]
    assert (await store.create(message(), lease=10)).outcome == "full"
    assert (await store.create(message(queue="heavy"), lease=10)).outcome == "created"
    for one in waiting:
        worker.start(one, "w")
        worker.finish(one, Status.SUCCESS, b"1", "{}")
    assert (await store.create(message(), lease=10)).outcome == "backlog"
    # What is known already is answered all the same.
    assert (await store.create(again(waiting[0]), lease=10)).outcome == "exists"


async def test_every_change_has_a_version_and_is_announced(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = message()
    async with store.redis.pubsub() as channel:
        await channel.subscribe(record_key(one.task_id))
        await store.create(one, lease=10)
        worker.start(one, "w")
        worker.progress(one, 1, 2)
        worker.finish(one, Status.SUCCESS, b"1", "{}")
        seen = []
        while len(seen) < 4:
            heard = await channel.get_message(ignore_subscribe_messages=True, timeout=5)
            if heard:
                seen.append(heard["data"])
    assert seen == ["1", "2", "3", "4"]


async def test_a_lost_record_is_made_again(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = await made(store)
    await store.redis.flushdb()
    assert worker.start(one, "w").outcome == "run"
    await store.redis.flushdb()
    assert worker.progress(one, 1, 2) == "go"
    assert worker.finish(one, Status.SUCCESS, b"1", "{}") == Status.SUCCESS
    record = await store.record(one.task_id)
    assert record["created_at"] == str(one.created_at)
    assert (record["name"], record["digest"], record["payload"]) == (one.name, one.digest, '{"text":"a"}')


async def test_only_an_archived_record_that_did_not_change_may_expire(store: AsyncTaskStore) -> None:
    one = await made(store)
    await store.withdraw(one, certain=False, error=ERROR)
    version = (await store.record(one.task_id))["version"]
    await store.create(again(one), lease=10)
    await store.archived("archive", [("0-1", one.task_id, version)])
    assert await store.redis.ttl(record_key(one.task_id)) == -1
    version = (await store.record(one.task_id))["version"]
    await store.archived("archive", [("0-1", one.task_id, version)])
    assert await store.redis.ttl(record_key(one.task_id)) == -1
    await store.cancel(one.task_id, "light")
    version = (await store.record(one.task_id))["version"]
    await store.archived("archive", [("0-1", one.task_id, version)])
    assert 0 < await store.redis.ttl(record_key(one.task_id)) <= 60


async def test_a_full_redis_refuses_new_tasks_and_ends_old_ones(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = await made(store)
    limit = (await store.redis.config_get("maxmemory"))["maxmemory"]
    policy = (await store.redis.config_get("maxmemory-policy"))["maxmemory-policy"]
    await store.redis.config_set("maxmemory-policy", "noeviction")
    await store.redis.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            await store.create(message(), lease=10)
        assert worker.start(one, "w").outcome == "run"
        assert worker.finish(one, Status.SUCCESS, b"1", "{}") == Status.SUCCESS
    finally:
        await store.redis.config_set("maxmemory", limit)
        await store.redis.config_set("maxmemory-policy", policy)
