import json
from datetime import UTC, datetime, timedelta
from typing import Any

import bson
import pytest
from pymongo import UpdateOne

from app.database import TaskResultRepository
from app.database.items import REPLAY_WINDOW, REPLAYS_MAX, _earlier, _left_by
from app.database.results import _fits_bson, _replacement_of_older

DOCUMENT = {
    "task_id": "t-1",
    "name": "light.count_words",
    "status": "SUCCESS",
    "progress": None,
    "result": {"words": 6},
    "error": None,
    "attempts": 1,
    "queue": "light",
    "request_id": "r-1",
    "created_at": "2023-11-14T22:13:20.123Z",
    "started_at": "2023-11-14T22:13:21.000Z",
    "finished_at": "2023-11-14T22:13:22.999Z",
    "owner": "key-1",
    "digest": "d",
    "epoch": 2,
    "version": 7,
}
NOW = datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)

# What JSON can say and BSON cannot.
NOT_BSON = [{"k": 2**63}, [-(2**63) - 1, 10**40], {"a\0b": 1}]


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch) -> TaskResultRepository:
    monkeypatch.setattr("app.database.results.present", lambda: NOW)
    return TaskResultRepository({"task_results": None}, retention_days=30)


@pytest.mark.parametrize("value", [None, 0, "x", [], {}, {"$set": 1, "a.b": 2, "": 3}, 2**63 - 1, [1.5, {"k": [None]}]])
def test_what_bson_takes_fits(value: Any):
    assert _fits_bson(value)


@pytest.mark.parametrize("value", [*NOT_BSON, "\ud800", {"\ud800": 1}, [{"k": ["\udfff"]}]])
def test_what_bson_does_not_take_does_not_fit(value: Any):
    assert not _fits_bson(value)


def row_of(repository: TaskResultRepository, **changes: Any) -> dict[str, Any]:
    return repository._row({**DOCUMENT, **changes})  # noqa: SLF001  pure, and needs no MongoDB


def test_a_row_is_the_document_and_what_orders_and_expires_it(repository: TaskResultRepository):
    assert row_of(repository) == {
        **DOCUMENT,
        "_id": "2023-11-14T22:13:20.123Z-t-1",
        "result_json": None,
        "expires_at": NOW + timedelta(days=30),
    }


@pytest.mark.parametrize("result", NOT_BSON)
def test_a_result_that_bson_does_not_take_is_kept_as_text(repository: TaskResultRepository, result: Any):
    row = row_of(repository, result=result)
    bson.encode(row)
    assert json.loads(row.pop("result_json")) == result
    assert row == {name: value for name, value in row_of(repository, result=None).items() if name != "result_json"}


def test_a_row_replaces_only_an_older_one_of_its_task(repository: TaskResultRepository):
    row = row_of(repository)
    content = {name: value for name, value in row.items() if name != "_id"}
    assert _replacement_of_older(row) == UpdateOne(
        {"task_id": "t-1", "$or": [{"epoch": {"$lt": 2}}, {"epoch": 2, "version": {"$lt": 7}}]}, {"$set": content}
    )


def test_times_have_the_milliseconds_that_bson_keeps():
    expires = row_of(TaskResultRepository({"task_results": None}, retention_days=1))["expires_at"]
    assert expires.microsecond % 1000 == 0
    assert timedelta(hours=23) < expires - datetime.now(UTC) <= timedelta(days=1)


ITEM = {"_id": 7, "identity": "i", "digest": "d", "created_at": NOW - timedelta(days=9)}


def version(number: int, age: timedelta = timedelta(0)) -> dict[str, Any]:
    return {"name": f"of {number}", "version": number, "edge": f"e{number}", "updated_at": NOW - age}


def test_a_change_keeps_what_a_replay_may_still_ask_for():
    item = {**ITEM, **version(4), "earlier": [version(2, REPLAY_WINDOW), version(3, REPLAY_WINDOW / 2)]}
    assert _earlier(item, NOW) == [version(3, REPLAY_WINDOW / 2), version(4)]


def test_a_version_that_no_edge_has_made_is_not_kept():
    made = {name: value for name, value in version(1).items() if name != "edge"}
    assert _earlier({**ITEM, **made}, NOW) == []


def test_no_more_than_some_versions_are_kept():
    item = {**ITEM, **version(99), "earlier": [version(number) for number in range(50)]}
    assert _earlier(item, NOW) == [*(version(number) for number in range(51 - REPLAYS_MAX, 50)), version(99)]


def test_a_replay_finds_the_item_as_its_request_left_it():
    item = {**ITEM, **version(4), "earlier": [version(2), version(3)]}
    assert _left_by("e4", item) == item
    assert _left_by("e2", item) == {**ITEM, **version(2)}
    assert _left_by("e1", item) is None
    tombstone = {**ITEM, "version": 5, "edge": "e5", "deleted_at": NOW, "earlier": [version(4)]}
    assert _left_by("e4", tombstone) == {**ITEM, **version(4)}
    assert _left_by("e5", tombstone) is None
