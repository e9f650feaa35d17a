"""Events: published once, brought to every subscribed service at least once, in effect once."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from uuid import uuid4

import aio_pika
import httpx
import pymongo
import pytest

from app import problems
from app.context import Context
from app.contracts import EventName, UserCreated
from app.engine.envelope import Event
from app.engine.errors import PermanentError
from app.engine.events import Handlers
from tests.integration.harness import Stack, bearer, command, new_key, paused, problem, wait_until

pytestmark = pytest.mark.integration

GOOD = {"sku": "s", "quantity": 1}
LIMIT = 3  # deliveries after the first, in the queues that are made here


@pytest.fixture
def database(stack: Stack) -> Iterator[Any]:
    with pymongo.MongoClient(stack.settings.mongodb_url.get_secret_value()) as client:
        yield client["stack"]


@pytest.fixture
def admin(stack: Stack) -> dict[str, str]:
    return bearer(new_key(stack, "--admin"))


@pytest.fixture
async def channel(stack: Stack) -> AsyncIterator[Any]:
    connection = await aio_pika.connect(stack.settings.rabbitmq_url.get_secret_value())
    async with connection:
        yield await connection.channel()


@pytest.fixture
async def service(stack: Stack, channel: Any) -> AsyncIterator[str]:
    """A service of its own, whose queue is as those of the contracts are, for `user.*`."""
    name = f"test-{uuid4().hex[:8]}"
    arguments = {
        "x-queue-type": "quorum",
        "x-delivery-limit": LIMIT,
        "x-overflow": "reject-publish",
        "x-dead-letter-exchange": "dead",
        "x-dead-letter-strategy": "at-least-once",
    }
    queue = await channel.declare_queue(f"events.{name}", durable=True, arguments=arguments)
    await queue.bind("events", routing_key="user.*")
    yield name
    # By a connection of its own: a test may have ended the first.
    connection = await aio_pika.connect(stack.settings.rabbitmq_url.get_secret_value())
    async with connection:
        await (await connection.channel()).queue_delete(f"events.{name}")


@pytest.fixture
def on(service: str) -> Handlers:
    """Handlers whose effects are documents of the collection of the service's name."""
    handlers = Handlers()

    @handlers("user.created")
    async def note(event: Event, session: Any, database: Any) -> None:
        await database[service].insert_one({"event": event.id}, session=session)

    return handlers


def publish(api: httpx.Client, user: str = "u", **headers: str) -> dict[str, Any]:
    body = {"event_type": "user.created", "data": {"user_id": user}}
    answer = api.post("/api/events", json=body, headers=headers)
    assert answer.status_code == 202, answer.text
    return answer.json()


async def until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    return await asyncio.to_thread(wait_until, condition, seconds)


def effects(database: Any, service: str, event_id: str) -> int:
    return database[service].count_documents({"event": event_id})


def letters(database: Any, service: str) -> list[dict[str, Any]]:
    return list(database["dead_letters"].find({"queue": f"events.{service}"}))


def test_an_event_reaches_a_service_once(api: httpx.Client, database: Any) -> None:
    told = publish(api, "u-7")
    assert told["event_type"] == "user.created"
    row = wait_until(lambda: database["audit"].find_one({"id": told["event_id"]}))
    assert (row["type"], row["data"]["user_id"], row["time"]) == ("user.created", "u-7", told["time"])
    assert (row["source"], row["dataversion"], row["specversion"]) == ("/api/events", 1, "1.0")


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"event_type": "user.eaten", "data": {}}, ["body", "event_type"]),
        ({"event_type": "user.created"}, ["body", "data"]),
        ({"event_type": "user.created", "data": {}}, ["body", "data", "user_id"]),
        ({"event_type": "user.created", "data": {"user_id": "a", "shoe": 44}}, ["body", "data", "shoe"]),
        ({"event_type": "user.created", "data": {"user_id": "a"}, "source": "me"}, ["body", "source"]),
        (
            {
                "event_type": "order.placed",
                "data": {"order_id": "o", "customer_id": "c", "lines": [GOOD, {"sku": "s"}]},
            },
            ["body", "data", "lines", 1, "quantity"],
        ),
    ],
)
def test_what_fits_no_schema_is_refused(api: httpx.Client, body: dict[str, Any], place: list[str]) -> None:
    document = problem(api.post("/api/events", json=body), 422, "invalid")
    assert [error["loc"] for error in document["errors"]] == [place]


@pytest.mark.parametrize("kind", ["item.created", "task.failed"])
def test_what_the_stack_itself_tells_of_nobody_else_may(api: httpx.Client, kind: str) -> None:
    answer = api.post("/api/events", json={"event_type": kind, "data": {"item_id": "x", "name": "x"}})
    assert "itself" in problem(answer, 422, "invalid")["detail"]


def test_the_same_key_makes_one_event(api: httpx.Client, database: Any) -> None:
    key = {"Idempotency-Key": uuid4().hex}
    body = {"event_type": "user.created", "data": {"user_id": "u"}}
    first, second = (api.post("/api/events", json=body, headers=key) for _ in range(2))
    assert first.json() == second.json()
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    other = {"event_type": "user.created", "data": {"user_id": "v"}}
    problem(api.post("/api/events", json=other, headers=key), 422, "key-reused")
    other = {"event_type": "user.deleted", "data": {"user_id": "u"}}
    problem(api.post("/api/events", json=other, headers=key), 422, "key-reused")
    wait_until(lambda: database["audit"].find_one({"id": first.json()["event_id"]}))
    last = publish(api)["event_id"]
    wait_until(lambda: database["audit"].find_one({"id": last}))
    assert database["audit"].count_documents({"id": first.json()["event_id"]}) == 1


def test_an_event_that_nginx_tries_twice_is_one(stack: Stack, database: Any) -> None:
    edge = {"X-Edge-Request-Id": uuid4().hex}
    body = {"event_type": "user.created", "data": {"user_id": "u"}}
    answers = [httpx.post(f"{replica}/api/events", json=body, headers=edge, timeout=30) for replica in stack.replicas]
    assert {answer.status_code for answer in answers} == {202}
    (event_id,) = {answer.json()["event_id"] for answer in answers}
    wait_until(lambda: database["audit"].find_one({"id": event_id}))
    time.sleep(1)
    assert database["audit"].count_documents({"id": event_id}) == 1


def test_a_replica_that_dies_does_not_show(stack: Stack, api: httpx.Client, database: Any) -> None:
    try:
        os.kill(stack.pid("api-1"), signal.SIGKILL)
        ids = [publish(api)["event_id"] for _ in range(20)]
    finally:
        wait_until(stack.settled, 60)
    wait_until(lambda: database["audit"].count_documents({"id": {"$in": ids}}) == len(ids))


def test_without_the_broker_an_event_is_refused_and_can_be_sent_again(
    stack: Stack, api: httpx.Client, database: Any
) -> None:
    key = {"Idempotency-Key": uuid4().hex}
    body = {"event_type": "user.created", "data": {"user_id": "u"}}
    with paused(stack, "rabbitmq"):
        refused = api.post("/api/events", json=body, headers=key)
        problem(refused, 503, "event-not-published")
        assert int(refused.headers["retry-after"]) >= 1
    answer = wait_until(lambda: (again := api.post("/api/events", json=body, headers=key)).status_code == 202 and again)
    event_id = answer.json()["event_id"]
    wait_until(lambda: database["audit"].find_one({"id": event_id}))
    time.sleep(1)
    assert database["audit"].count_documents({"id": event_id}) == 1


def test_without_redis_only_events_with_a_key_are_refused(stack: Stack, api: httpx.Client) -> None:
    with paused(stack, "redis"):
        publish(api)
        body = {"event_type": "user.created", "data": {"user_id": "u"}}
        problem(api.post("/api/events", json=body, headers={"Idempotency-Key": uuid4().hex}), 503, "unavailable")
    wait_until(stack.settled, 60)


async def test_handlers_get_what_their_pattern_names(api: httpx.Client, context: Context, service: str) -> None:
    on, seen = Handlers(), list[tuple[str, str]]()

    @on("user.*")
    async def every(event: Event, _session: Any, _database: Any) -> None:
        seen.append(("every", event.type))

    @on("user.deleted")
    async def some(event: Event, _session: Any, _database: Any) -> None:
        assert event.data.user_id == "gone"
        seen.append(("some", event.type))

    async with context.subscriber(service, on):
        await asyncio.to_thread(publish, api)
        body = {"event_type": "user.deleted", "data": {"user_id": "gone"}}
        (await asyncio.to_thread(api.post, "/api/events", json=body)).raise_for_status()
        await until(lambda: len(seen) == 3)
    assert sorted(seen) == [("every", "user.created"), ("every", "user.deleted"), ("some", "user.deleted")]


async def test_what_is_delivered_many_times_at_once_counts_once(
    context: Context, database: Any, service: str, on: Handlers
) -> None:
    event = Event.new(uuid4().hex, UserCreated(user_id="u"), kind=EventName.USER_CREATED, source="/test")
    await asyncio.gather(*(context.publisher.emit(event.document(), queue=f"events.{service}") for _ in range(10)))
    async with context.subscriber(service, on), context.subscriber(service, on):
        await until(lambda: effects(database, service, event.id))
        await until_empty(context, service)
    assert effects(database, service, event.id) == 1


async def until_empty(context: Context, service: str) -> None:
    """Nothing waits, and a further event has passed: so have those before it."""
    for _ in range(200):
        if (await context.publisher.depths([f"events.{service}"]))[f"events.{service}"] == 0:
            break
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)


async def test_a_handler_that_fails_leaves_nothing_and_is_tried_again(
    api: httpx.Client, context: Context, database: Any, service: str, on: Handlers
) -> None:
    tries = []

    @on("user.*")
    async def fails_twice(event: Event, session: Any, database: Any) -> None:
        await database[service].insert_one({"event": event.id, "by": "second"}, session=session)
        tries.append(await database[service].count_documents({"event": event.id}))
        if len(tries) < 3:
            raise OSError("not yet")

    async with context.subscriber(service, on, backoff_max=0.1):
        event_id = (await asyncio.to_thread(publish, api))["event_id"]
        await until(lambda: effects(database, service, event_id))
        await until_empty(context, service)
    # Seen from outside of the transaction, nothing was ever there.
    assert tries == [0, 0, 0]
    assert effects(database, service, event_id) == 2
    assert not letters(database, service)


async def test_a_handler_that_always_fails_leaves_a_letter_and_a_replay_has_the_effect(  # noqa: PLR0913, PLR0917
    stack: Stack, api: httpx.Client, context: Context, database: Any, service: str, on: Handlers, admin: dict[str, str]
) -> None:
    broken, tries = [True], []

    @on("user.*")
    async def fails(_event: Event, _session: Any, _database: Any) -> None:
        tries.append(1)
        if broken:
            raise OSError("the shop is closed")

    async with context.subscriber(service, on, backoff_max=0.1):
        told = await asyncio.to_thread(publish, api, "u-9")
        (letter,) = await until(lambda: letters(database, service))
        assert (letter["reason"], letter["attempts"], len(tries)) == ("exhausted", LIMIT + 1, LIMIT + 1)
        assert letter["error"] == {"type": "OSError", "message": "the shop is closed"}
        assert effects(database, service, told["event_id"]) == 0

        url = f"/api/dead-letters/{letter['_id']}"
        listed = api.get("/api/dead-letters", params={"queue": f"events.{service}"}, headers=admin).json()
        (shown,) = listed["dead_letters"]
        assert (shown["name"], shown["event_id"], shown["task_id"]) == ("user.created", told["event_id"], None)
        assert shown == api.get(url, headers=admin).json()
        event = shown["message"]["event"]
        assert (event["id"], event["data"]["user_id"], event["time"]) == (told["event_id"], "u-9", told["time"])

        # Still broken: a letter of its own for the second death.
        answer = api.post(f"{url}/replay", headers=admin)
        assert (answer.status_code, answer.json()["event_id"]) == (202, told["event_id"])
        problem(api.post(f"{url}/replay", headers=admin), 409, "conflict")
        await until(lambda: len(letters(database, service)) == 2)

        broken.clear()
        replayed = await asyncio.to_thread(
            command, stack, "dead-letters", "replay", "--all", "--queue", f"events.{service}"
        )
        assert (replayed.returncode, replayed.stdout) == (0, "1 replayed\n")
        await until(lambda: effects(database, service, told["event_id"]))
        # By another hand, late: the event was handled, and is not again.
        await context.publisher.emit(event, queue=f"events.{service}")
        await until_empty(context, service)
    assert effects(database, service, told["event_id"]) == 1
    assert {row["state"] for row in letters(database, service)} == {"replayed"}
    # It went to the one service that had failed.
    assert database["audit"].count_documents({"id": told["event_id"]}) == 1


async def test_a_permanent_error_is_not_tried_again_and_its_letter_can_be_discarded(  # noqa: PLR0913, PLR0917
    api: httpx.Client, context: Context, database: Any, service: str, on: Handlers, admin: dict[str, str]
) -> None:
    tries = []

    @on("user.*")
    async def hopeless(_event: Event, _session: Any, _database: Any) -> None:
        tries.append(1)
        raise PermanentError("no such user")

    async with context.subscriber(service, on):
        event_id = (await asyncio.to_thread(publish, api))["event_id"]
        (letter,) = await until(lambda: letters(database, service))
    assert (letter["reason"], letter["attempts"], letter["error"]["message"], tries) == (
        "permanent", 1, "no such user", [1],
    )  # fmt: skip
    assert effects(database, service, event_id) == 0
    assert api.delete(f"/api/dead-letters/{letter['_id']}", headers=admin).status_code == 204
    problem(api.post(f"/api/dead-letters/{letter['_id']}/replay", headers=admin), 409, "conflict")


async def test_a_handler_that_takes_too_long_has_failed(
    api: httpx.Client, context: Context, database: Any, service: str
) -> None:
    on = Handlers()

    @on("user.*")
    async def slow(_event: Event, _session: Any, _database: Any) -> None:
        await asyncio.sleep(60)

    @on("user.*")
    async def unreached(event: Event, session: Any, database: Any) -> None:
        await database[service].insert_one({"event": event.id}, session=session)

    async with context.subscriber(service, on, timeout=0.2, backoff_max=0.1):
        event_id = (await asyncio.to_thread(publish, api))["event_id"]
        (letter,) = await until(lambda: letters(database, service))
    assert (letter["reason"], letter["error"]["type"]) == ("exhausted", "time_limit_exceeded")
    assert effects(database, service, event_id) == 0


async def test_a_handler_that_leaves_mongodb_no_time_has_failed(
    api: httpx.Client, context: Context, database: Any, service: str
) -> None:
    on = Handlers()

    @on("user.*")
    async def slow(event: Event, session: Any, database: Any) -> None:
        await asyncio.sleep(0.5)
        await database[service].insert_one({"event": event.id}, session=session)

    async with context.subscriber(service, on, timeout=0.4, backoff_max=0.1):
        event_id = (await asyncio.to_thread(publish, api))["event_id"]
        (letter,) = await until(lambda: letters(database, service))
    assert (letter["reason"], letter["attempts"]) == ("exhausted", LIMIT + 1)
    assert effects(database, service, event_id) == 0


def envelope(**changes: Any) -> bytes:
    event = Event.new(uuid4().hex, UserCreated(user_id="u"), kind=EventName.USER_CREATED, source="/test")
    return json.dumps({**event.document(), **changes}).encode()


async def test_what_is_no_event_is_kept_and_holds_nothing_up(  # noqa: PLR0913, PLR0917
    api: httpx.Client, context: Context, database: Any, channel: Any, service: str, on: Handlers
) -> None:
    bodies = [
        b"\xff",
        b"[]",
        b'{"specversion": "1.0"}',
        envelope(specversion="0.3"),
        envelope(type="user.eaten"),
        envelope(dataversion=2),
        envelope(time="yesterday"),
        envelope(data={"user_id": 7}),
        envelope(id=""),
    ]
    for body in bodies:
        await channel.default_exchange.publish(aio_pika.Message(body), routing_key=f"events.{service}")
    async with context.subscriber(service, on):
        event_id = (await asyncio.to_thread(publish, api))["event_id"]
        await until(lambda: effects(database, service, event_id))
        await until(lambda: len(letters(database, service)) == len(bodies))
    assert {letter["reason"] for letter in letters(database, service)} == {"bad_envelope"}
    faults = [letter["error"]["message"] for letter in letters(database, service)]
    assert "version 2 of user.created is not known" in faults
    with pytest.raises(problems.Conflict):
        await context.replay(letters(database, service)[0], by="test")


async def test_what_ends_each_process_that_takes_it_is_given_up(
    stack: Stack, context: Context, database: Any, service: str, on: Handlers
) -> None:
    event = Event.new(uuid4().hex, UserCreated(user_id="u"), kind=EventName.USER_CREATED, source="/test")
    await context.publisher.emit(event.document(), queue=f"events.{service}")
    for _ in range(LIMIT + 1):
        connection = await aio_pika.connect(stack.settings.rabbitmq_url.get_secret_value())
        queue = await (await connection.channel()).get_queue(f"events.{service}", ensure=False)
        await queue.get(timeout=10)
        await connection.close()
    (letter,) = await until(lambda: letters(database, service))
    assert (letter["reason"], letter["attempts"], letter["event_id"]) == ("poison", 0, event.id)
    assert await context.replay(letter, by="test")
    async with context.subscriber(service, on):
        await until(lambda: effects(database, service, event.id))


@pytest.mark.timeout(240)
async def test_mongodb_away_is_no_attempt(
    stack: Stack, context: Context, database: Any, service: str, on: Handlers
) -> None:
    event = Event.new(uuid4().hex, UserCreated(user_id="u"), kind=EventName.USER_CREATED, source="/test")
    async with context.subscriber(service, on, timeout=0.3, backoff_max=0.2):
        with paused(stack, "database"):
            await context.publisher.emit(event.document(), queue=f"events.{service}")
            await asyncio.sleep(15)  # an attempt and the question whether MongoDB is there take some 8 s
        await until(lambda: effects(database, service, event.id), 60)
    assert not letters(database, service)
    assert database["event_markers"].find_one({"_id": f"{service} /test {event.id}"})["state"] == "handled"
    assert "attempts" not in database["event_markers"].find_one({"_id": f"{service} /test {event.id}"})
    assert effects(database, service, event.id) == 1


@pytest.mark.timeout(240)
async def test_who_has_waited_long_for_mongodb_goes_to_the_end_of_the_queue(
    stack: Stack, context: Context, database: Any, service: str, on: Handlers
) -> None:
    event = Event.new(uuid4().hex, UserCreated(user_id="u"), kind=EventName.USER_CREATED, source="/test")
    sent = []
    emit = context.publisher.emit

    async def counted(*arguments: Any, **options: Any) -> None:
        sent.append(options)
        await emit(*arguments, **options)

    context.publisher.emit = counted  # type: ignore[method-assign]
    async with context.subscriber(service, on, timeout=0.3, backoff_max=0.2, patience=0.1):
        with paused(stack, "database"):
            await emit(event.document(), queue=f"events.{service}", replay="r")
            for _ in range(600):
                if len(sent) > LIMIT:
                    break
                await asyncio.sleep(0.1)
        await until(lambda: effects(database, service, event.id), 60)
        await until_empty(context, service)
    assert len(sent) > LIMIT
    assert {options["replay"] for options in sent} == {"r"}
    assert not letters(database, service)
    assert effects(database, service, event.id) == 1


@pytest.mark.timeout(240)
async def test_the_broker_away_in_between_costs_nothing(  # noqa: PLR0913, PLR0917
    stack: Stack, api: httpx.Client, context: Context, database: Any, service: str, on: Handlers
) -> None:
    async with context.subscriber(service, on):
        first = (await asyncio.to_thread(publish, api))["event_id"]
        await until(lambda: effects(database, service, first))
        (await asyncio.to_thread(stack.run, "status")).check_returncode()
        os.kill(stack.pid("rabbitmq"), signal.SIGKILL)
        await until(stack.settled, 90)
        second = await until(lambda: published_again(api), 60)
        await until(lambda: effects(database, service, second))
    assert [effects(database, service, event) for event in (first, second)] == [1, 1]
    await until(lambda: database["audit"].find_one({"id": second}))


def published_again(api: httpx.Client) -> str | None:
    answer = api.post("/api/events", json={"event_type": "user.created", "data": {"user_id": "u"}})
    return answer.json()["event_id"] if answer.status_code == 202 else None


@pytest.mark.timeout(240)
def test_a_process_that_is_killed_at_work_loses_nothing(stack: Stack, api: httpx.Client, database: Any) -> None:
    try:
        with paused(stack, "database"):
            ids = [publish(api)["event_id"] for _ in range(5)]
            time.sleep(1)  # they are in work
            os.kill(stack.pid("events-1"), signal.SIGKILL)
            time.sleep(0.2)
        wait_until(lambda: database["audit"].count_documents({"id": {"$in": ids}}) >= len(ids), 90)
    finally:
        wait_until(stack.settled, 60)
    time.sleep(1)
    assert {event_id: database["audit"].count_documents({"id": event_id}) for event_id in ids} == dict.fromkeys(ids, 1)


async def test_who_is_told_to_stop_finishes_what_is_in_work(  # noqa: PLR0913, PLR0917
    api: httpx.Client, context: Context, database: Any, channel: Any, service: str, on: Handlers
) -> None:
    begun = asyncio.Event()

    @on("user.*")
    async def long(_event: Event, _session: Any, _database: Any) -> None:
        begun.set()
        await asyncio.sleep(1)

    async with context.subscriber(service, on):
        event_id = (await asyncio.to_thread(publish, api))["event_id"]
        await asyncio.wait_for(begun.wait(), 20)
    assert effects(database, service, event_id) == 1
    queue = await channel.declare_queue(f"events.{service}", passive=True)
    assert (await queue.get(fail=False, timeout=5)) is None


async def test_who_is_told_to_stop_does_not_wait_for_the_next_attempt(
    api: httpx.Client, context: Context, database: Any, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engine.events.GRACE", 3600)  # who waits that long does not pass
    failing = Handlers()

    @failing("user.*")
    async def fails(_event: Event, _session: Any, _database: Any) -> None:
        raise OSError("not yet")

    async with context.subscriber(service, failing, backoff_max=3600) as subscriber:
        subscriber._pause = lambda _: 3600.0  # noqa: SLF001
        event_id = (await asyncio.to_thread(publish, api))["event_id"]
        marker = {"_id": f"{service} /api/events {event_id}"}
        await until(lambda: database["event_markers"].find_one(marker))
        await asyncio.sleep(0.5)
    assert (await context.publisher.depths([f"events.{service}"])) == {f"events.{service}": 1}
    assert not letters(database, service)


async def test_a_queue_that_was_deleted_is_made_again(
    stack: Stack, api: httpx.Client, database: Any, channel: Any
) -> None:
    await channel.queue_delete("events.audit")
    await until(lambda: "made again" in stack.log("events-1"))
    await until(lambda: stack.log("events-1").rpartition("made again")[2].count("waiting for events"))
    event_id = await until(lambda: published_again(api))
    await until(lambda: database["audit"].find_one({"id": event_id}))
