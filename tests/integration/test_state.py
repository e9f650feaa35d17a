"""Each transition of a record, on a real Redis: who wins when requests, workers and messages race."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest
import redis
import redis.asyncio

from app.database import ResultReader
from app.engine.message import Message
from app.engine.record import OPEN, Status, error_document, record_key
from app.engine.state import AsyncTaskStore, Started, TaskStore
from tests.integration.harness import Stack

pytestmark = pytest.mark.integration

DATABASE = 5  # not the one that the stack's processes use
ERROR = error_document("not_published", "why")
FAILED = {"error": b"{}", "reason": "permanent"}


@pytest.fixture
def url(stack: Stack) -> str:
    return stack.settings.redis_url.get_secret_value().removesuffix("0") + str(DATABASE)


@pytest.fixture
async def store(url: str) -> AsyncIterator[AsyncTaskStore]:
    client = redis.asyncio.Redis.from_url(url, decode_responses=True)
    await client.flushdb()
    yield AsyncTaskStore(client, queue_max=3, backlog_max=3, result_ttl=60, look_after=30)
    await client.aclose()


@pytest.fixture
def worker(stack: Stack, url: str) -> Iterator[TaskStore]:
    with redis.Redis.from_url(url, decode_responses=True) as client:
        archive = ResultReader(stack.settings.mongodb_url.get_secret_value(), "test_state", timeout=5)
        limits = {"light": 100.0, "heavy": 600.0}
        yield TaskStore(client, archive, celery_result_ttl=60, look_after=30, run_limits=limits)
        archive.close()


def message(**fields: object) -> Message:
    return replace(
        Message(str(uuid4()), "light.count_words", "light", {"text": "a"}, "digest", "request", publish=uuid4().hex),
        **fields,
    )


def again(one: Message) -> Message:
    """The same request once more: all but the publish is equal."""
    return replace(one, publish=uuid4().hex)


def begin(worker: TaskStore, one: Message) -> Started:
    return worker.start(one, "w", uuid4().hex)


def reopen(store: AsyncTaskStore, one: Message) -> Any:
    return store.reopen(one, lease=10, error={"type": "why", "message": "it failed"}, reason="exhausted")


def started(worker: TaskStore, one: Message) -> Message:
    """The message as its run, which must be allowed, knows it."""
    answer = begin(worker, one)
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
    assert begin(worker, one).outcome == "dead"
    reopened = await store.create(again(one), lease=10)
    assert (reopened.outcome, reopened.epoch) == ("created", 2)
    assert begin(worker, one).outcome == "stale"
    assert begin(worker, replace(again(one), epoch=2)).outcome == "run"


async def test_a_worker_that_was_faster_than_the_confirm_wins(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = await made(store)
    assert begin(worker, one).outcome == "run"
    assert await store.withdraw(one, certain=False, error=ERROR) is Status.STARTED


async def test_a_redelivery_takes_over_and_a_second_publish_does_not(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = await made(store)
    first = started(worker, one)
    assert begin(worker, again(one)).outcome == "duplicate"
    second = started(worker, one)
    assert (await store.record(one.task_id))["attempts"] == "2"
    # The worker that was thought dead comes back.
    assert worker.progress(first, 1, 2) == "lost"
    assert worker.retry(first, 5, ERROR) == "lost"
    assert worker.finish(first, Status.FAILURE, FAILED, "{}") == "lost"
    assert worker.finish(second, Status.SUCCESS, {"result": b'"done"'}, "{}") == Status.SUCCESS
    repeated = begin(worker, again(one))
    assert (repeated.outcome, repeated.result) == ("stored", "done")


async def test_a_run_that_was_taken_over_changes_nothing_more(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = await made(store)
    one = started(worker, one)
    assert worker.retry(one, 5, ERROR) == "RETRY"
    following = replace(again(one), retries=1, run=0)
    following = started(worker, following)
    assert worker.progress(one, 1, 2) == "lost"
    assert worker.retry(one, 5, ERROR) == "lost"
    assert worker.finish(one, Status.SUCCESS, {"result": b"1"}, "{}") == "lost"
    assert worker.progress(following, 1, 2) == "go"
    assert worker.finish(following, Status.FAILURE, FAILED, "{}") == Status.FAILURE
    assert worker.finish(following, Status.SUCCESS, {"result": b"1"}, "{}") == "lost"
    assert await status(store, one) == Status.FAILURE


async def test_an_old_message_after_the_retry_was_written_publishes_it_again(
    store: AsyncTaskStore, worker: TaskStore
) -> None:
    one = await made(store)
    one = started(worker, one)
    worker.retry(one, 5, ERROR)
    redelivered = begin(worker, one)
    assert (redelivered.outcome, redelivered.retries) == ("republish", 1)
    assert 4 < redelivered.due_in <= 5
    begin(worker, replace(again(one), retries=1))
    assert begin(worker, one).outcome == "stale"


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


async def test_a_repeated_start_or_end_is_one(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = await made(store)
    first, second = [worker.start(one, "w", "this call") for _ in range(2)]
    assert first == second
    run = replace(one, run=first.run)
    ends = [worker.finish(run, Status.SUCCESS, {"result": b"1"}, "{}") for _ in range(2)]
    assert ends == [Status.SUCCESS, Status.SUCCESS]
    assert await store.redis.xlen("tasks:finished") == 1
    assert (await store.record(one.task_id))["starts"] == "1"


async def test_a_parent_that_knows_no_run_ends_the_one_of_its_worker(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = await made(store)
    started(worker, one)
    assert worker.finish(one, Status.FAILURE, FAILED, "{}", worker="other") == "lost"
    assert worker.finish(one, Status.FAILURE, FAILED, "{}", worker="w") == Status.FAILURE


async def test_an_interrupted_run_is_looked_at_soon_and_not_blamed(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = await made(store)
    started(worker, one)
    worker.interrupt(one, "other")
    assert "lost" not in await store.record(one.task_id)
    worker.interrupt(one, "w")
    record = await store.record(one.task_id)
    assert (record["lost"], record["starts"]) == ("1", "0")
    assert 28 < await looks(store, one) <= 31


async def test_a_message_of_an_epoch_that_redis_has_lost_runs(store: AsyncTaskStore, worker: TaskStore) -> None:
    """As when Redis crashes within the second after a replay: the record is the failure of before."""
    one = message()
    await failed(store, worker, one)
    replayed = replace(again(one), epoch=2)
    run = started(worker, replayed)
    record = await store.record(one.task_id)
    assert (record["status"], record["epoch"], record["retries"]) == ("STARTED", "2", "0")
    assert worker.finish(run, Status.SUCCESS, {"result": b"1"}, "{}") == Status.SUCCESS
    dying = message()
    await failed(store, worker, dying)
    assert await bury(store, replace(again(dying), epoch=2)) == "again"
    assert (await store.record(dying.task_id))["epoch"] == "2"


async def test_a_cancel_that_meets_a_failing_attempt_says_so(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = await made(store)
    run = started(worker, one)
    await store.cancel(one.task_id, "light")
    assert worker.retry(run, 5, ERROR) == "CANCELLED"
    assert "cancelled" in (await store.record(one.task_id))["error"]


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
    assert begin(worker, one).outcome == "dead"
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
    assert begin(worker, waiting).outcome == "dead"
    running = await made(store)
    running = started(worker, running)
    assert await store.cancel(running.task_id, "light") == "CANCELLING"
    assert worker.progress(running, 1, 2) == "cancel"
    assert worker.retry(running, 1, ERROR) == "CANCELLED"
    ended = await made(store)
    ended = started(worker, ended)
    worker.finish(ended, Status.SUCCESS, {"result": b"1"}, "{}")
    assert await store.cancel(ended.task_id, "light") == "SUCCESS"


async def test_a_full_queue_and_a_full_archive_stream_refuse(store: AsyncTaskStore, worker: TaskStore) -> None:
    waiting = [await made(store) for _ in range(3)]
    assert (await store.create(message(), lease=10)).outcome == "full"
    assert (await store.create(message(queue="heavy"), lease=10)).outcome == "created"
    for one in waiting:
        worker.finish(started(worker, one), Status.SUCCESS, {"result": b"1"}, "{}")
    assert (await store.create(message(), lease=10)).outcome == "backlog"
    # What is known already is answered all the same.
    assert (await store.create(again(waiting[0]), lease=10)).outcome == "exists"


async def test_every_change_has_a_version_and_is_announced(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = message()
    async with store.redis.pubsub() as channel:
        await channel.subscribe(record_key(one.task_id))
        await store.create(one, lease=10)
        one = started(worker, one)
        worker.progress(one, 1, 2)
        worker.finish(one, Status.SUCCESS, {"result": b"1"}, "{}")
        seen = []
        while len(seen) < 4:
            heard = await channel.get_message(ignore_subscribe_messages=True, timeout=5)
            if heard:
                seen.append(heard["data"])
    assert seen == ["1", "2", "3", "4"]


async def test_a_lost_record_is_made_again(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = await made(store)
    await store.redis.flushdb()
    one = started(worker, one)
    await store.redis.flushdb()
    assert worker.progress(one, 1, 2) == "go"
    assert worker.finish(one, Status.SUCCESS, {"result": b"1"}, "{}") == Status.SUCCESS
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
        one = started(worker, one)
        assert worker.finish(one, Status.SUCCESS, {"result": b"1"}, "{}") == Status.SUCCESS
    finally:
        await store.redis.config_set("maxmemory", limit)
        await store.redis.config_set("maxmemory-policy", policy)


async def looks(store: AsyncTaskStore, one: Message) -> float | None:
    """Seconds until the reconciler looks at a task; None if it never will."""
    at = await store.redis.zscore(OPEN, one.task_id)
    seconds, _ = await store.redis.time()
    return None if at is None else at / 1000 - seconds


async def overdue(store: AsyncTaskStore, *rows: Message) -> None:
    await store.redis.zadd(OPEN, {one.task_id: number for number, one in enumerate(rows, 1)})


async def test_an_open_task_has_a_time_at_which_it_is_looked_at(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = message()
    await store.create(one, lease=10)
    assert 8 < await looks(store, one) <= 11
    await store.confirm(one)
    assert 28 < await looks(store, one) <= 31
    run = started(worker, one)
    assert 128 < await looks(store, one) <= 131  # its time limit and the margin
    assert worker.retry(run, 50, ERROR) == "RETRY"
    assert 78 < await looks(store, one) <= 81  # once it is overdue
    following = started(worker, replace(again(run), retries=1, run=0))
    worker.finish(following, Status.SUCCESS, {"result": b"1"}, "{}")
    assert await looks(store, one) is None


@pytest.mark.parametrize("certain", [True, False])
async def test_what_is_withdrawn_is_not_looked_at(store: AsyncTaskStore, *, certain: bool) -> None:
    one = message()
    await store.create(one, lease=10)
    assert await store.withdraw(one, certain=certain, error=ERROR) is None
    assert await looks(store, one) is None


async def test_only_what_is_due_is_found_and_the_oldest_first(store: AsyncTaskStore) -> None:
    first, second, third = message(), message(), message()
    for one, lease in ((third, 10), (second, 0.002), (first, 0.001)):
        await store.create(one, lease=lease)
    await overdue(store, first, second)
    assert await store.due(10) == [first.task_id, second.task_id]
    assert await store.due(1) == [first.task_id]


async def test_of_two_reconcilers_one_takes_a_lost_task(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = message()
    await store.create(one, lease=10)
    await store.confirm(one)
    await overdue(store, one)
    mine, yours = again(one), again(one)
    assert await store.retake(mine, lease=10, again_in=60)
    assert not await store.retake(yours, lease=10, again_in=60)
    assert 58 < await looks(store, one) <= 61
    assert (await store.create(again(one), lease=10)).outcome == "leased"
    await store.confirm(mine)
    # The first message was not lost after all: whichever comes first runs, the other one does not.
    started(worker, one)
    assert begin(worker, mine).outcome == "duplicate"


async def test_the_message_of_a_lost_run_takes_over_and_the_old_run_is_heard_no_more(
    store: AsyncTaskStore, worker: TaskStore
) -> None:
    one = message()
    await store.create(one, lease=10)
    old = started(worker, one)
    new = again(one)
    assert not await store.retake(new, lease=10, again_in=60)  # it may still run
    await overdue(store, one)
    assert await store.retake(new, lease=10, again_in=60)
    assert worker.progress(old, 1, 2) == "lost"
    run = started(worker, new)
    assert worker.finish(old, Status.SUCCESS, {"result": b"0"}, "{}") == "lost"
    assert worker.finish(run, Status.SUCCESS, {"result": b"1"}, "{}") == Status.SUCCESS
    assert not await store.retake(again(one), lease=10, again_in=60)


async def test_a_look_that_found_nothing_is_put_off_and_forgotten_with_the_record(store: AsyncTaskStore) -> None:
    one, gone = message(), message()
    await store.create(one, lease=10)
    await overdue(store, one)
    await overdue(store, gone)
    await store.postpone([(one.task_id, 100), (gone.task_id, 100)])
    assert 98 < await looks(store, one) <= 101
    assert await looks(store, gone) is None
    await store.postpone([(one.task_id, 500)])  # by another one, that looked at the same time
    assert await looks(store, one) <= 101


def bury(store: AsyncTaskStore, one: Message, *, too_often: bool = True) -> Any:
    return store.bury(one, too_often=too_often, starts=2, error=ERROR, reason="poison")


async def test_a_task_that_killed_its_workers_fails(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = message()
    await store.create(one, lease=10)
    for _ in range(2):
        started(worker, one)
    assert await bury(store, one) == "FAILURE"
    record = await store.record(one.task_id)
    assert (record["status"], record["reason"], record["attempts"]) == ("FAILURE", "poison", "2")
    assert await store.redis.xlen("tasks:finished") == 1
    assert await bury(store, one) == "FAILURE"  # the message once more
    assert await store.redis.xlen("tasks:finished") == 1


async def test_a_task_that_hardly_ran_is_not_blamed_for_its_deliveries(
    store: AsyncTaskStore, worker: TaskStore
) -> None:
    one = message()
    await store.create(one, lease=10)
    await store.confirm(one)
    started(worker, one)
    assert await bury(store, one) == "again"
    assert await store.due(5) == [one.task_id]
    new = again(one)
    assert await store.retake(new, lease=10, again_in=60)
    started(worker, new)
    assert await bury(store, one) == "stale"  # of the first message nothing depends any more
    assert await bury(store, new) == "FAILURE"


async def test_a_dead_message_ends_no_task_for_which_another_message_stands(
    store: AsyncTaskStore, worker: TaskStore
) -> None:
    one = message()
    await store.create(one, lease=10)
    run = started(worker, one)
    assert worker.retry(run, 50, ERROR) == "RETRY"
    assert await bury(store, one, too_often=False) == "stale"
    following = started(worker, replace(again(run), retries=1, run=0))
    assert await bury(store, one, too_often=False) == "stale"
    worker.finish(following, Status.SUCCESS, {"result": b"1"}, "{}")
    assert await bury(store, following, too_often=False) == "stale"
    assert await status(store, one) == Status.SUCCESS


async def test_a_dead_message_whose_record_is_lost_still_ends_its_task(store: AsyncTaskStore) -> None:
    one = message(created_at=1_700_000_000_000)
    assert await bury(store, one, too_often=False) == "missing"
    await store.recreate(one)
    assert await bury(store, one, too_often=False) == "FAILURE"
    record = await store.record(one.task_id)
    assert (record["status"], record["created_at"], record["owner"]) == ("FAILURE", "1700000000000", "")


async def failed(store: AsyncTaskStore, worker: TaskStore, one: Message) -> None:
    created = await store.create(one, lease=10)
    await store.confirm(one)
    run = started(worker, replace(one, epoch=created.epoch))
    assert worker.finish(run, Status.FAILURE, FAILED, "{}") == Status.FAILURE


async def test_a_failed_task_is_reopened_once_and_its_old_messages_are_void(
    store: AsyncTaskStore, worker: TaskStore
) -> None:
    one = message()
    await failed(store, worker, one)
    replay = again(one)
    created = await reopen(store, replay)
    assert (created.outcome, created.epoch) == ("created", 2)
    assert (await reopen(store, replay)).epoch == 2  # the same call, its answer lost
    assert (await reopen(store, again(one))).outcome == "leased"
    await store.confirm(replace(replay, epoch=2))
    assert (await reopen(store, again(one))).outcome == "exists"
    assert begin(worker, one).outcome == "stale"
    record = await store.record(one.task_id)
    assert record["status"] == "PENDING"
    assert not {"error", "reason", "finished_at"} & record.keys()
    run = started(worker, replace(replay, epoch=2))
    assert worker.finish(run, Status.SUCCESS, {"result": b"1"}, "{}") == Status.SUCCESS
    assert (await reopen(store, again(one))).outcome == "exists"


async def test_a_replay_that_the_broker_did_not_take_may_be_tried_again(
    store: AsyncTaskStore, worker: TaskStore
) -> None:
    one = message()
    await failed(store, worker, one)
    replay = again(one)
    await reopen(store, replay)
    for _ in range(2):
        assert await store.withdraw(replay, certain=True, error=ERROR) is None
    record = await store.record(one.task_id)
    assert (record["status"], record["reason"]) == ("FAILURE", "exhausted")
    assert "it failed" in record["error"]  # as before, and no client's repeat runs it
    assert (await store.create(again(one), lease=10)).outcome == "exists"
    created = await reopen(store, again(one))
    assert (created.outcome, created.epoch) == ("created", 3)


async def test_a_record_that_has_expired_is_reopened_from_its_letter(store: AsyncTaskStore, worker: TaskStore) -> None:
    one = message(created_at=1_700_000_000_000, epoch=4)
    created = await reopen(store, one)
    assert (created.outcome, created.epoch, created.created_at) == ("created", 5, one.created_at)
    started(worker, replace(one, epoch=5))


async def test_a_full_queue_tells_how_fast_it_drains(store: AsyncTaskStore, worker: TaskStore) -> None:
    waiting = [message() for _ in range(3)]
    for one in waiting:
        await store.create(one, lease=10)
    full = await store.create(message(), lease=10)
    assert (full.outcome, full.drain_rate) == ("full", 0)
    for one in waiting[:2]:
        started(worker, one)
        await store.create(message(), lease=10)
    full = await store.create(message(), lease=10)
    assert full.outcome == "full"
    assert 0.1 <= full.drain_rate <= 0.2  # two in a window of ten seconds


@pytest.fixture
def roomy(store: AsyncTaskStore) -> AsyncTaskStore:
    """The same store, but for many."""
    return AsyncTaskStore(store.redis, queue_max=1000, backlog_max=1000, result_ttl=60, look_after=30)


async def test_many_at_once_are_settled_one_by_one(roomy: AsyncTaskStore) -> None:
    rows = [message() for _ in range(250)]
    await roomy.create(rows[7], lease=10)
    await roomy.confirm(rows[7])
    await roomy.create(again(rows[170]), lease=10)
    await roomy.redis.script_flush()
    created = await roomy.create_many(rows, lease=10)
    assert [one.outcome for one in created] == [
        {7: "exists", 170: "leased"}.get(number, "created") for number in range(250)
    ]
    ours = [one for number, one in enumerate(rows) if number not in (7, 170)]
    assert await roomy.confirm_many(ours[:100]) == [None] * 100
    found = await roomy.withdraw_many([(one, True) for one in rows[:120]], error=ERROR)
    # What is confirmed is nobody's to take back; 7 and what follows the first hundred of ours too.
    assert found == [Status.PENDING] * 101 + [None] * 19
    assert await status(roomy, rows[119]) is None
    assert (await roomy.create_many([again(rows[0]), again(rows[170])], lease=1))[0].outcome == "exists"
    assert await roomy.create_many([], lease=1) == []


async def test_rows_past_the_bound_of_a_queue_are_full(store: AsyncTaskStore) -> None:
    created = await store.create_many([message() for _ in range(5)], lease=10)
    assert [one.outcome for one in created] == ["created"] * 3 + ["full"] * 2


async def test_of_what_is_unknown_nothing_is_made_if_so_asked(store: AsyncTaskStore) -> None:
    known, unknown = await made(store), message()
    created = await store.create_many([again(known), unknown], lease=10, known_only=True)
    assert [one.outcome for one in created] == ["leased", "unknown"]
    assert await store.record(unknown.task_id) == {}
    assert (await store.create(replace(unknown, epoch=4), lease=10)).epoch == 4


async def test_rows_that_redis_refuses_have_the_error_in_their_place(store: AsyncTaskStore) -> None:
    limit = (await store.redis.config_get("maxmemory"))["maxmemory"]
    policy = (await store.redis.config_get("maxmemory-policy"))["maxmemory-policy"]
    await store.redis.config_set("maxmemory-policy", "noeviction")
    await store.redis.config_set("maxmemory", "1mb")
    try:
        errors = await store.create_many([message() for _ in range(2)], lease=10)
    finally:
        await store.redis.config_set("maxmemory", limit)
        await store.redis.config_set("maxmemory-policy", policy)
    assert {type(error) for error in errors} == {redis.exceptions.OutOfMemoryError}
    await store.redis.connection_pool.disconnect()
    nobody = redis.asyncio.Redis.from_url("redis://127.0.0.1:1/0")
    away = AsyncTaskStore(nobody, queue_max=3, backlog_max=3, result_ttl=60, look_after=30)
    errors = await away.create_many([message() for _ in range(250)], lease=10)
    assert [type(error) for error in errors] == [redis.exceptions.ConnectionError] * 250
    await nobody.aclose()
