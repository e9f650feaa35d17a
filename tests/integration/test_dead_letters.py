"""What fails for good: hooks, the event, the dead letter, and its replay."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import aio_pika
import httpx
import pytest
import redis
from kombu import Connection, Exchange

from app import problems
from app.context import Context
from tests.integration.harness import Stack, finished, start, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture
def records(stack: Stack) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(stack.settings.redis_url.get_secret_value(), decode_responses=True) as client:
        yield client


async def letter_of(context: Context, task_id: str, count: int = 1) -> dict[str, Any]:
    """The latest letter of a task, once it has `count` of them."""
    for _ in range(400):
        rows = await context.database["dead_letters"].find({"task_id": task_id}).to_list(None)
        if len(rows) == count:
            return rows[-1]
        await asyncio.sleep(0.05)
    raise AssertionError("no letter")


@pytest.mark.parametrize(
    ("task", "reason", "kind", "attempts"),
    [
        (("test.hopeless", "light", {"failures": 1}), "permanent", "hopeless", 1),
        (("test.hopeless", "light", {"failures": "x"}), "permanent", "ValidationError", 1),
        (("test.exhausted", "light", {"failures": 9}), "exhausted", "OSError", 2),
        (("test.endless", "light", {"stubborn": True}), "time_limit", "time_limit_exceeded", 1),
        (("test.endless", "light", {"stubborn": False}), "time_limit", "time_limit_exceeded", 1),
        (("test.unknown", "light", {}), "unknown_task", "unknown_task", 1),
        (("test.poison", "heavy", {"failures": 99}), "poison", "poison", 6),
    ],
)
async def test_whatever_fails_for_good_has_a_letter(  # noqa: PLR0913, PLR0917
    api: httpx.Client,
    context: Context,
    task: tuple[str, str, dict[str, Any]],
    reason: str,
    kind: str,
    attempts: int,
) -> None:
    task_id = await start(context, *task)
    document = finished(api, task_id, 60)
    assert (document["status"], document["error"]["type"], document["attempts"]) == ("FAILURE", kind, attempts)
    letter = await letter_of(context, task_id)
    told = {field: letter[field] for field in ("name", "queue", "reason", "attempts", "request_id", "error", "state")}
    same = {field: document[field] for field in ("name", "queue", "attempts", "request_id", "error")}
    assert told == {**same, "reason": reason, "state": "open"}
    assert json.loads(letter["message"]["payload"]) == task[2]


async def test_what_is_no_task_is_kept_and_ends_no_worker(stack: Stack, context: Context) -> None:
    worker = stack.pid("light-1")
    good = {"task": "light.count_words", "id": str(uuid4())}
    body = b'[[], {"payload": {"text": "a"}}, {}]'
    bad = [
        (b"not json", good),
        (b'{"a": 1}', good),
        (body, {"task": "light.count_words"}),
        (body, {}),
        (body, {**good, "timelimit": "soon"}),
        (body, {**good, "id": {"nested": 1}}),
    ]
    before = await context.database["dead_letters"].count_documents({"reason": "bad_envelope"})
    with Connection(stack.settings.rabbitmq_url.get_secret_value()) as connection:
        producer = connection.Producer(exchange=Exchange("tasks", type="topic"))
        for number, (text, headers) in enumerate(bad):
            producer.publish(
                text, routing_key="light", content_type="application/json", content_encoding="utf-8",
                headers={**headers, "number": number}, serializer=None,
            )  # fmt: skip
    for _ in range(200):
        count = await context.database["dead_letters"].count_documents({"reason": "bad_envelope"})
        if count == before + len(bad):
            break
        await asyncio.sleep(0.05)
    assert count == before + len(bad)
    assert stack.pid("light-1") == worker
    letter = await context.database["dead_letters"].find_one({"error.message": "its body is not JSON"})
    assert letter["queue"] == "light"
    assert letter["message"]["body_base64"] == "bm90IGpzb24="
    with pytest.raises(problems.Conflict):
        await context.tasks.replay(letter, by="test")


async def test_a_failure_is_told_as_an_event(stack: Stack, context: Context) -> None:
    connection = await aio_pika.connect(stack.settings.rabbitmq_url.get_secret_value())
    async with connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind("events", routing_key="task.*")
        task_id = await start(context, "test.hopeless", "light", {"failures": 1})
        async with queue.iterator(timeout=20) as messages:
            async for message in messages:
                event = json.loads(message.body)
                if event["data"]["task_id"] == task_id:
                    break
    assert message.routing_key == event["type"] == "task.failed"
    assert event["id"] == f"{task_id}:1" == message.message_id
    assert event["data"]["error"]["type"] == "hopeless"


async def test_hooks_are_called_once_for_each_state_and_their_errors_harm_nothing(
    api: httpx.Client, context: Context, records: redis.Redis
) -> None:
    lucky = await start(context, "test.hooked", "light", {"failures": 1})
    unlucky = await start(context, "test.hooked", "light", {"failures": 9})
    assert finished(api, lucky)["status"] == "SUCCESS"
    assert finished(api, unlucky)["status"] == "FAILURE"
    for task_id, hooks in ((lucky, ["retry", "success"]), (unlucky, ["retry", "failure"])):
        wait_until(lambda task_id=task_id, hooks=hooks: records.lrange(f"hooks:{task_id}", 0, -1) == hooks)


async def test_a_replay_runs_the_task_again_under_its_id(api: httpx.Client, context: Context) -> None:
    task_id = await start(context, "test.poison", "heavy", {"failures": 8})
    assert finished(api, task_id, 60)["error"]["type"] == "poison"
    letter = await letter_of(context, task_id)
    answers = await asyncio.gather(*(context.tasks.replay(letter, by="test") for _ in range(5)))
    assert sorted(answers) == [False, False, False, False, True]
    document = finished(api, task_id, 60)
    assert (document["status"], document["error"], document["result"]) == ("SUCCESS", None, 9)
    assert document["attempts"] == 9
    assert not await context.tasks.replay(letter, by="test")


async def test_a_replay_that_fails_again_has_a_letter_of_its_own(api: httpx.Client, context: Context) -> None:
    task_id = await start(context, "test.hopeless", "light", {"failures": 1})
    finished(api, task_id)
    first = await letter_of(context, task_id)
    assert await context.tasks.replay(first, by="test")
    second = await letter_of(context, task_id, 2)
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert (first["request_id"], first["message"]) == (second["request_id"], second["message"])


async def test_a_replay_works_when_the_record_has_expired(
    api: httpx.Client, context: Context, records: redis.Redis
) -> None:
    task_id = await start(context, "test.flaky", "light", {"failures": 0})
    document = finished(api, task_id)
    failing = await start(context, "test.hopeless", "light", {"failures": 1})
    finished(api, failing)
    letter = await letter_of(context, failing)
    wait_until(lambda: records.ttl(f"task:{failing}") > 0)
    records.delete(f"task:{failing}")
    assert api.get(f"/api/async/status/{failing}").json()["status"] == "FAILURE"
    assert await context.tasks.replay(letter, by="test")
    again = await letter_of(context, failing, 2)
    assert again["epoch"] == 2
    assert api.get(f"/api/async/status/{failing}").json()["created_at"] != document["created_at"]
