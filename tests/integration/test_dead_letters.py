"""What fails for good: hooks, the event, the dead letter, and its replay."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import aio_pika
import httpx
import pytest
import redis
from kombu import Connection, Exchange

from app import problems
from app.context import Context
from app.engine.service import Accepted, Order
from tests.integration.harness import Stack, bearer, command, finished, new_key, paused, problem, start, wait_until

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
    answers = await asyncio.gather(*(context.tasks.replay(letter, by="test") for _ in range(5)), return_exceptions=True)
    # While one is being published the others are told to come back: whether it leaves is not known yet.
    assert [answer for answer in answers if answer is True] == [True]
    assert all(answer in (True, False) or isinstance(answer, problems.InFlight) for answer in answers)
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


@pytest.fixture(scope="module")
def admin(stack: Stack) -> dict[str, str]:
    return bearer(new_key(stack, "--admin"))


async def dead(context: Context, count: int, text: str) -> list[str]:
    """The ids of `count` tasks that have failed, and have their letters."""
    name = "test.hopeless"
    ids = [await start(context, name, "light", {"failures": 1, "mark": text}) for _ in range(count)]
    for task_id in ids:
        await letter_of(context, task_id)
    return ids


async def test_operators_list_show_replay_and_discard(
    api: httpx.Client, context: Context, admin: dict[str, str]
) -> None:
    first, second = await dead(context, 2, "api")
    page = api.get("/api/dead-letters", params={"limit": 1, "task": "test.hopeless"}, headers=admin)
    (latest,) = page.json()["dead_letters"]
    assert latest["task_id"] == second
    assert latest["message"]["payload"] == {"failures": 1, "mark": "api"}
    (earlier,) = api.get(page.links["next"]["url"], headers=admin).json()["dead_letters"]
    assert earlier["task_id"] == first
    one = api.get(f"/api/dead-letters/{earlier['id']}", headers=admin)
    assert one.json() == earlier
    replayed = api.post(f"/api/dead-letters/{earlier['id']}/replay", headers=admin)
    assert (replayed.status_code, replayed.json()["task_id"]) == (202, first)
    assert replayed.headers["location"] == f"/api/async/status/{first}"
    problem(api.post(f"/api/dead-letters/{earlier['id']}/replay", headers=admin), 409, "conflict")
    assert api.delete(f"/api/dead-letters/{latest['id']}", headers=admin).status_code == 204
    problem(api.delete(f"/api/dead-letters/{latest['id']}", headers=admin), 409, "conflict")
    problem(api.post(f"/api/dead-letters/{latest['id']}/replay", headers=admin), 409, "conflict")
    shown = api.get("/api/dead-letters", params={"state": "discarded"}, headers=admin).json()["dead_letters"][0]
    assert (shown["id"], shown["settled_by"]) == (latest["id"], admin["Authorization"].split("_")[1])
    await letter_of(context, first, 2)


@pytest.mark.parametrize("letter_id", ["665f1c2ab8d94e0f7a3b5c1d", "nonsense"])
def test_no_such_letter(api: httpx.Client, admin: dict[str, str], letter_id: str) -> None:
    problem(api.get(f"/api/dead-letters/{letter_id}", headers=admin), 404, "not-found")
    problem(api.post(f"/api/dead-letters/{letter_id}/replay", headers=admin), 404, "not-found")
    problem(api.delete(f"/api/dead-letters/{letter_id}", headers=admin), 404, "not-found")
    problem(api.get("/api/dead-letters", params={"cursor": "x"}, headers=admin), 422, "invalid")


def test_dead_letters_are_for_operators(api: httpx.Client, stack: Stack) -> None:
    problem(api.get("/api/dead-letters"), 401, "unauthorized")
    problem(api.get("/api/dead-letters", headers=bearer(new_key(stack))), 403, "forbidden")


@pytest.mark.timeout(240)
async def test_a_command_replays_a_thousand(
    stack: Stack, api: httpx.Client, context: Context, records: redis.Redis
) -> None:
    ids = [str(uuid4()) for _ in range(1000)]
    for task_id in ids:
        records.set(f"fragile:{task_id}", "broken")
    for begin in range(0, 1000, 100):
        orders = [Order("test.fragile", {"failures": 0}, task_id, "", "light") for task_id in ids[begin : begin + 100]]
        answers = await context.tasks.submit_many(orders, request_id="thousand")
        assert all(isinstance(answer, Accepted) for answer in answers)
    for task_id in ids:
        assert finished(api, task_id, 60)["status"] == "FAILURE"
        records.delete(f"fragile:{task_id}")
    for _ in range(600):
        if await context.letters.count(name="test.fragile", queue="light") == 1000:
            break
        await asyncio.sleep(0.1)
    listed = command(stack, "dead-letters", "list", "--task", "test.fragile", "--limit", "3", "--json")
    rows = json.loads(listed.stdout)
    assert len(rows) == 3
    single = command(stack, "dead-letters", "show", rows[0]["id"])
    assert json.loads(single.stdout)["task_id"] in ids
    replayed = command(stack, "dead-letters", "replay", "--all", "--task", "test.fragile", "--json")
    assert replayed.returncode == 0, replayed.stderr
    assert json.loads(replayed.stdout) == {"replayed": 1000}
    assert {finished(api, task_id, 60)["status"] for task_id in ids} == {"SUCCESS"}
    again = command(stack, "dead-letters", "replay", "--all", "--task", "test.fragile")
    assert (again.returncode, again.stdout) == (0, "nothing to do\n")


async def test_a_command_discards_by_id_and_says_what_it_does_not_find(stack: Stack, context: Context) -> None:
    (task_id,) = await dead(context, 1, "discard")
    letter = str((await letter_of(context, task_id))["_id"])
    assert command(stack, "dead-letters", "discard", letter).stdout == "1 discarded\n"
    missing = command(stack, "dead-letters", "replay", "665f1c2ab8d94e0f7a3b5c1d")
    assert (missing.returncode, missing.stdout) == (1, "1 not found: 665f1c2ab8d94e0f7a3b5c1d\n")
    assert command(stack, "dead-letters", "replay").returncode == 2
    assert command(stack, "dead-letters", "replay", letter, "--all").returncode == 2


async def test_a_replay_that_the_broker_does_not_take_leaves_its_letter_open(
    stack: Stack, api: httpx.Client, context: Context, admin: dict[str, str]
) -> None:
    (task_id,) = await dead(context, 1, "unpublished")
    url = f"/api/dead-letters/{(await letter_of(context, task_id))['_id']}/replay"
    with paused(stack, "rabbitmq"), ThreadPoolExecutor(2) as pool:
        first = pool.submit(api.post, url, headers=admin)
        await asyncio.sleep(0.5)
        problem(api.post(url, headers=admin), 409, "in-flight")
        problem(first.result(), 503, "not-published")
    document = api.get(f"/api/async/status/{task_id}").json()
    assert (document["status"], document["error"]["type"]) == ("FAILURE", "hopeless")
    wait_until(lambda: api.post(url, headers=admin).status_code == 202)
    await letter_of(context, task_id, 2)
