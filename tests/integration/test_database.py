"""The repositories, under both drivers."""

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest
from bson import ObjectId

from app.database import ItemRepository, TaskResultRepository, create_client, ensure_indexes
from tests.integration.harness import Stack

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


async def test_items(database: Any) -> None:
    items = ItemRepository(database)
    content = {"name": "x", "description": "", "category": "c", "metadata": {}}
    made, new = await items.create(content, identity="i", digest="d")
    assert new
    assert await items.create(content, identity="i", digest="d") == (made, False)
    assert await items.page(limit=5, after=None, category="c") == [made]
    assert await items.page(limit=5, after=made["_id"], category=None) == []
    changed = await items.update(made["_id"], content | {"name": "y"}, versions=[1], edge="e")
    assert changed is not None
    assert (changed["name"], changed["version"]) == ("y", 2)
    # The same request again is answered, another one that expects the old version is not.
    assert await items.update(made["_id"], content | {"name": "y"}, versions=[1], edge="e") == changed
    assert await items.update(made["_id"], content, versions=[1], edge="f") is None
    assert not await items.delete(made["_id"], versions=[1])
    assert await items.delete(made["_id"], versions=None)
    assert await items.get(made["_id"]) is None
    assert not await items.delete(ObjectId(), versions=None)


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
