"""The repositories, under both drivers."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from bson import ObjectId
from pymongo.errors import DuplicateKeyError, PyMongoError

from app.contracts import EventName, ItemCreated
from app.database import (
    AlreadyHandledError,
    ItemRepository,
    MarkerRepository,
    OutboxRepository,
    TaskResultRepository,
    create_client,
    ensure_indexes,
    in_transaction,
    outbox,
)
from app.problems import PreconditionFailed
from tests.integration.harness import Stack, paused

pytestmark = pytest.mark.integration


@pytest.fixture(params=["pymongo", "motor"])
async def database(stack: Stack, request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    client = create_client(stack.settings.model_copy(update={"mongodb_driver": request.param}), name="test")
    name = f"test_{uuid4().hex}"
    await ensure_indexes(client[name])
    yield client[name]
    await client.drop_database(name)
    closing = client.close()
    if closing is not None:
        await closing


CONTENT = {"name": "x", "description": "", "category": "c", "metadata": {}}


@pytest.fixture
def items(database: Any) -> ItemRepository:
    return ItemRepository(database, identity_ttl=86_400, timeout=5)


def becomes(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda _: {**CONTENT, "name": name}


async def test_items(items: ItemRepository) -> None:
    made, new = await items.create(CONTENT, identity="i", digest="d")
    item_id = made["_id"]
    assert new
    assert await items.create(CONTENT, identity="i", digest="d") == (made, False)
    assert await items.page(limit=5, after=None, category="c") == [made]
    assert await items.page(limit=5, after=item_id, category=None) == []
    changed = await items.change(item_id, becomes("y"), versions=[1], edge="e")
    assert changed is not None
    assert (changed["name"], changed["version"]) == ("y", 2)
    with pytest.raises(PreconditionFailed):
        await items.change(item_id, becomes("z"), versions=[1], edge="f")
    with pytest.raises(PreconditionFailed):
        await items.delete(item_id, versions=[1], edge="g")
    assert await items.get(item_id) == changed
    assert await items.delete(item_id, versions=[2], edge="g")
    assert await items.get(item_id) is None
    assert await items.page(limit=5, after=None, category=None) == []
    assert await items.page(limit=5, after=None, category="c") == []
    assert not await items.delete(item_id, versions=None, edge="h")
    assert not await items.delete(ObjectId(), versions=None, edge="h")
    assert await items.change(item_id, becomes("z"), versions=None, edge="h") is None
    assert await items.change(ObjectId(), becomes("z"), versions=None, edge="h") is None


async def test_a_replay_is_answered_like_the_first_time_whatever_came_between(items: ItemRepository) -> None:
    made, _ = await items.create(CONTENT, identity="i", digest="d")
    item_id = made["_id"]
    states = {}
    for number in range(1, 6):
        left = await items.change(item_id, becomes(str(number)), versions=[number], edge=f"e{number}")
        assert left is not None
        states[f"e{number}"] = {name: left[name] for name in (*made, "edge")}

    async def replays() -> None:
        for number in range(1, 6):
            again = await items.change(item_id, becomes("other"), versions=[number], edge=f"e{number}")
            assert again is not None
            assert {name: again[name] for name in (*made, "edge")} == states[f"e{number}"]

    await replays()
    present = await items.get(item_id)
    assert present is not None
    assert (present["name"], present["version"]) == ("5", 6)
    assert "earlier" not in (await items.page(limit=1, after=None, category=None))[0]
    assert await items.delete(item_id, versions=None, edge="gone")
    assert await items.delete(item_id, versions=None, edge="gone")
    await replays()


async def test_a_deleted_item_keeps_its_identity_and_not_its_content(database: Any, items: ItemRepository) -> None:
    made, _ = await items.create(CONTENT, identity="i", digest="d")
    await items.delete(made["_id"], versions=None, edge="gone")
    tombstone = await database["items"].find_one({"_id": made["_id"]})
    assert tombstone.pop("expires_at") - tombstone.pop("deleted_at") == timedelta(days=1)
    assert tombstone == {
        "_id": made["_id"], "identity": "i", "digest": "d", "created_at": made["created_at"], "version": 2,
        "edge": "gone", "earlier": [],
    }  # fmt: skip
    assert await items.create(CONTENT, identity="i", digest="d") == (made, False)
    assert (await database["items"].index_information())["expires_at_1"]["expireAfterSeconds"] == 0


async def test_items_of_an_older_version_are_alive(database: Any, items: ItemRepository) -> None:
    old = {
        "_id": ObjectId(), **CONTENT, "version": 3, "identity": "i", "digest": "d", "edge": "e",
        "created_at": datetime(2026, 1, 1, tzinfo=UTC), "updated_at": datetime(2026, 1, 2, tzinfo=UTC),
    }  # fmt: skip
    await database["items"].insert_one(dict(old))
    assert await items.page(limit=5, after=None, category=None) == [old]
    assert await items.get(old["_id"]) == old
    changed = await items.change(old["_id"], becomes("y"), versions=[3], edge="f")
    assert changed is not None
    # What nobody can replay any more is not kept.
    assert (changed["version"], changed["earlier"]) == (4, [])


async def test_many_that_change_an_item_at_once_all_count(items: ItemRepository) -> None:
    made, _ = await items.create(CONTENT, identity="i", digest="d")

    def longer(item: dict[str, Any]) -> dict[str, Any]:
        return {**CONTENT, "name": item["name"] + "x"}

    await asyncio.gather(*(items.change(made["_id"], longer, versions=None, edge=f"e{n}") for n in range(8)))
    item = await items.get(made["_id"])
    assert item is not None
    assert (item["name"], item["version"]) == ("x" * 9, 9)


def document(result: Any = None, task_id: str = "t", epoch: int = 1, version: int = 1) -> dict[str, Any]:
    fixed = {"created_at": "2026-01-01T00:00:00.000Z", "status": "SUCCESS"}
    return {"task_id": task_id, **fixed, "result": result, "epoch": epoch, "version": version}


async def test_a_newer_result_replaces_an_older_one_and_never_the_other_way(database: Any) -> None:
    results = TaskResultRepository(database, retention_days=1)
    for result, epoch, version in ((1, 1, 4), (2, 1, 9), (3, 1, 9), (4, 1, 8), (5, 2, 2), (6, 1, 20)):
        assert await results.store([document(result, epoch=epoch, version=version)]) == {}
    assert await results.get("t") == document(5, epoch=2, version=2)
    assert await results.get("other") is None


async def test_a_batch_with_an_impossible_row_stores_the_others(database: Any) -> None:
    results = TaskResultRepository(database, retention_days=1)
    odd = {"$a": 2**70, "c\0": 1}
    rows = [document(1, "a"), document(odd, "b"), document(3, "c")]
    assert await results.store(rows) == {}
    assert [await results.get(name) for name in "abc"] == rows


async def test_indexes_are_there(database: Any) -> None:
    information = await database["task_results"].index_information()
    assert information["task_id_1"]["unique"]
    assert information["expires_at_1"]["expireAfterSeconds"] == 0
    assert (await database["items"].index_information())["identity_1"]["unique"]


async def test_what_is_archived_of_many_tasks_is_known(database: Any) -> None:
    results = TaskResultRepository(database, retention_days=1)
    rows = [{**document(None, name), "digest": f"d-{name}", "error": None, "owner": ""} for name in "abc"]
    await results.store(rows)
    known = await results.known(["a", "c", "x"])
    assert {name: (row["digest"], row["epoch"], row["error"]) for name, row in known.items()} == {
        "a": ("d-a", 1, None), "c": ("d-c", 1, None),
    }  # fmt: skip


async def test_an_item_and_its_event_are_written_together(database: Any, items: ItemRepository) -> None:
    made, _ = await items.create(CONTENT, identity="i", digest="d")
    await items.create(CONTENT, identity="i", digest="d")
    (row,) = await database["outbox"].find().to_list(None)
    told = {"item_id": str(made["_id"]), "name": "x", "category": "c"}
    assert (row["type"], json.loads(row["data"]), row["state"]) == ("item.created", told, "waiting")


async def test_an_item_whose_event_cannot_be_written_is_not_made(
    database: Any, items: ItemRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    await items.create(CONTENT, identity="i", digest="d")
    (taken,) = await database["outbox"].find().to_list(None)
    monkeypatch.setattr("app.database.outbox.row", lambda *_, **__: dict(taken))
    with pytest.raises(DuplicateKeyError):
        await items.create(CONTENT, identity="j", digest="d")
    assert await database["items"].count_documents({}) == 1
    assert await database["outbox"].count_documents({}) == 1


async def test_creates_of_one_identity_at_once_make_one_item_and_one_event(
    database: Any, items: ItemRepository
) -> None:
    made = await asyncio.gather(*(items.create(CONTENT, identity="i", digest="d") for _ in range(10)))
    assert sorted(new for _, new in made) == [False] * 9 + [True]
    assert len({item["_id"] for item, _ in made}) == 1
    assert await database["outbox"].count_documents({}) == 1


async def test_what_a_transaction_raises_undoes_it(database: Any) -> None:
    async def work(session: Any) -> None:
        await database["a"].insert_one({"_id": 1}, session=session)
        await database["b"].insert_one({"_id": 1}, session=session)
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011  it is the one above
        await in_transaction(database, work, seconds=5)
    assert await database["a"].count_documents({}) + await database["b"].count_documents({}) == 0


async def test_transactions_that_write_the_same_all_count(database: Any) -> None:
    await database["a"].insert_one({"_id": 1, "count": 0})
    attempts = 0

    async def work(session: Any) -> int:
        nonlocal attempts
        attempts += 1
        row = await database["a"].find_one({"_id": 1}, session=session)
        await database["a"].update_one({"_id": 1}, {"$set": {"count": row["count"] + 1}}, session=session)
        return row["count"]

    seen = await asyncio.gather(*(in_transaction(database, work, seconds=20) for _ in range(5)))
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert attempts > 5  # they met each other
    assert (await database["a"].find_one({"_id": 1}))["count"] == 5


async def test_a_transaction_ends_in_its_time(stack: Stack, database: Any) -> None:
    async def work(session: Any) -> None:
        await database["a"].insert_one({"_id": 1}, session=session)

    with paused(stack, "database"), pytest.raises(PyMongoError) as raised:
        await asyncio.wait_for(in_transaction(database, work, seconds=0.5), 20)
    assert raised.value.timeout
    # Once MongoDB has ended what it got too late to be of use.
    await in_transaction(database, work, seconds=40)
    assert await database["a"].count_documents({}) == 1


async def test_of_deliveries_at_once_one_has_the_effect(database: Any) -> None:
    markers = MarkerRepository(database, days=14)

    async def work(session: Any) -> None:
        await markers.mark("m", session=session)
        await database["effects"].insert_one({}, session=session)

    assert await markers.failed("m", {"type": "x", "message": "y"}, reason="exhausted") == 1
    assert await markers.failed("m", {"type": "x", "message": "z"}, reason="permanent") == 2
    failure = await markers.failure("m")
    assert failure is not None
    assert (failure["error"]["message"], failure["reason"], failure["attempts"]) == ("z", "permanent", 2)
    outcomes = await asyncio.gather(
        *(in_transaction(database, work, seconds=20) for _ in range(6)), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes].count(AlreadyHandledError) == 5, outcomes
    assert await database["effects"].count_documents({}) == 1
    with pytest.raises(AlreadyHandledError):
        await markers.failed("m", {"type": "x", "message": "y"}, reason="exhausted")
    assert await markers.failure("m") is None


async def test_what_was_published_leaves_the_outbox(database: Any) -> None:
    repository = OutboxRepository(database, ttl=86_400)
    rows = [
        outbox.row(EventName.ITEM_CREATED, ItemCreated(item_id=str(n), name="n"), source="/items") for n in range(5)
    ]
    await database["outbox"].insert_many(rows[::-1])
    waiting = await repository.waiting(3)
    assert [row["_id"] for row in waiting] == [row["_id"] for row in rows[:3]]
    await repository.published([row["_id"] for row in waiting])
    assert [row["_id"] for row in await repository.waiting(9)] == [row["_id"] for row in rows[3:]]
    kept = await database["outbox"].find_one({"_id": rows[0]["_id"]})
    assert kept["expires_at"] - datetime.now(UTC) > timedelta(hours=23)
    information = await database["outbox"].index_information()
    assert information["expires_at_1"]["expireAfterSeconds"] == 0
