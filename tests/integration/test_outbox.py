"""The event of a change comes if and only if the change was made, whoever dies in between."""

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import aio_pika
import httpx
import pymongo
import pytest

from app.context import Context
from app.database import OutboxRepository
from app.engine.outbox import Relay
from deploy.native.supervision import Supervisor
from tests.integration.harness import Stack, paused, problem, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture
def database(stack: Stack) -> Iterator[Any]:
    with pymongo.MongoClient(stack.settings.mongodb_url.get_secret_value()) as client:
        yield client["stack"]


@pytest.fixture
def no_beat(stack: Stack) -> Iterator[Any]:
    """Beat is stopped; calling this starts it."""
    supervisor = Supervisor(stack.layout)
    supervisor.stop(["beat"])
    started: list[bool] = []

    def start() -> None:
        if not started:
            started.append(True)
            supervisor.start("beat")

    yield start
    start()
    wait_until(stack.settled, 60)


@pytest.fixture
async def heard(stack: Stack) -> AsyncIterator[list[dict[str, Any]]]:
    """Every event that passes the exchange, as often as it does."""
    connection = await aio_pika.connect(stack.settings.rabbitmq_url.get_secret_value())
    async with connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind("events", routing_key="#")
        events: list[dict[str, Any]] = []

        async def note(message: Any) -> None:
            events.append(json.loads(message.body))

        await queue.consume(note, no_ack=True)
        yield events


def make(api: httpx.Client, **headers: str) -> str:
    answer = api.post("/api/items", json={"name": "x"}, headers=headers)
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def event_of(database: Any, item_id: str) -> dict[str, Any]:
    rows = [row for row in database["outbox"].find({"type": "item.created"}) if item_id in row["data"]]
    assert len(rows) == 1
    return rows[0]


def noted(database: Any, item_ids: list[str]) -> Counter[str]:
    """How often the service `audit` has heard of each item."""
    return Counter(row["data"]["item_id"] for row in database["audit"].find({"data.item_id": {"$in": item_ids}}))


def once(database: Any, *item_ids: str) -> bool:
    return noted(database, list(item_ids)) == dict.fromkeys(item_ids, 1)


def test_an_item_is_told_of_once_however_often_it_is_asked_for(api: httpx.Client, database: Any) -> None:
    key = uuid4().hex
    item_id = make(api, **{"Idempotency-Key": key})
    assert make(api, **{"Idempotency-Key": key}) == item_id
    problem(api.post("/api/items", json={"name": "y"}, headers={"Idempotency-Key": key}), 422, "key-reused")
    wait_until(lambda: once(database, item_id))
    row = event_of(database, item_id)
    wait_until(lambda: event_of(database, item_id)["state"] == "published")
    found = database["audit"].find_one({"data.item_id": item_id})
    assert (found["id"], found["type"], found["source"]) == (str(row["_id"]), "item.created", "/items")


def test_an_item_that_is_refused_is_not_told_of(api: httpx.Client, database: Any) -> None:
    before = database["outbox"].count_documents({})
    problem(api.post("/api/items", json={"name": ""}), 422, "invalid")
    assert database["outbox"].count_documents({}) == before


def test_a_crash_between_the_write_and_the_publish_loses_nothing(
    api: httpx.Client, database: Any, no_beat: Any
) -> None:
    item_id = make(api)
    time.sleep(2)  # OUTBOX_INTERVAL, twice
    assert event_of(database, item_id)["state"] == "waiting"
    assert not noted(database, [item_id])
    no_beat()
    wait_until(lambda: once(database, item_id))
    wait_until(lambda: event_of(database, item_id)["state"] == "published")


def test_a_create_that_never_came_to_its_end_is_an_item_with_its_event_or_neither(stack: Stack, database: Any) -> None:
    category = uuid4().hex
    with ThreadPoolExecutor(20) as pool:

        def create(number: int) -> httpx.Response:
            body = {"name": str(number), "category": category}
            return httpx.post(f"{stack.replicas[1]}/api/items", json=body, timeout=30)

        hanging = [pool.submit(create, number) for number in range(40)]
        time.sleep(0.1)
        os.kill(stack.pid("api-2"), signal.SIGKILL)
        assert any(answer.exception() for answer in hanging)
    wait_until(stack.settled, 60)
    time.sleep(1)  # what the dead replica had sent is done by then, or never
    ids = [str(row["_id"]) for row in database["items"].find({"category": category})]
    told = [json.loads(row["data"]) for row in database["outbox"].find({}) if category in row["data"]]
    assert sorted(event["item_id"] for event in told) == sorted(ids)
    if ids:
        wait_until(lambda: once(database, *ids))


def test_an_item_is_made_without_the_broker_and_told_of_when_it_is_back(
    stack: Stack, api: httpx.Client, database: Any
) -> None:
    with paused(stack, "rabbitmq"):
        item_id = make(api)
        time.sleep(4)  # the relay has tried, and has waited PUBLISH_TIMEOUT
        assert event_of(database, item_id)["state"] == "waiting"
    wait_until(lambda: once(database, item_id))
    wait_until(lambda: event_of(database, item_id)["state"] == "published")


class Forgetful(OutboxRepository):
    """Of a relay that dies after the confirm."""

    async def published(self, row_ids: Any) -> None:  # noqa: ARG002
        raise ConnectionError


async def test_a_relay_that_dies_between_publish_and_note_tells_twice_and_it_counts_once(
    api: httpx.Client, context: Context, database: Any, no_beat: Any, heard: list[dict[str, Any]]
) -> None:
    item_id = make(api)
    relay = Relay(Forgetful(context.database, ttl=60), context.publisher, interval=1, batch=100)
    with pytest.raises(ConnectionError):
        await relay.round()
    await asyncio.to_thread(wait_until, lambda: once(database, item_id))
    assert event_of(database, item_id)["state"] == "waiting"
    no_beat()
    await asyncio.to_thread(wait_until, lambda: event_of(database, item_id)["state"] == "published")

    def told() -> list[dict[str, Any]]:
        return [event for event in heard if event["data"].get("item_id") == item_id]

    for _ in range(200):
        if len(told()) == 2:
            break
        await asyncio.sleep(0.05)
    first, second = told()
    assert first == second
    assert first["id"] == str(event_of(database, item_id)["_id"])
    await asyncio.sleep(1)
    assert once(database, item_id)


async def test_two_relays_at_once_count_as_one(
    api: httpx.Client, context: Context, database: Any, no_beat: Any
) -> None:
    ids = [make(api) for _ in range(30)]
    relays = [Relay(context.outbox, context.publisher, interval=1, batch=7) for _ in range(2)]
    while await database_waits(context):
        await asyncio.gather(*(relay.round() for relay in relays))
    no_beat()
    await asyncio.to_thread(wait_until, lambda: once(database, *ids))
    assert {event_of(database, item_id)["state"] for item_id in ids} == {"published"}


async def database_waits(context: Context) -> bool:
    return bool(await context.outbox.waiting(1))


def test_of_a_beat_that_is_killed_again_and_again_each_event_counts_once(
    stack: Stack, api: httpx.Client, database: Any
) -> None:
    ids = []
    for number in range(60):
        ids.append(make(api))
        if number % 20 == 10:
            os.kill(stack.pid("beat"), signal.SIGKILL)
            wait_until(stack.settled, 60)
    wait_until(lambda: once(database, *ids), 60)
    wait_until(lambda: database["outbox"].count_documents({"state": "waiting"}) == 0)
    time.sleep(1)
    assert once(database, *ids)
