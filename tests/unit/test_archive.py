"""What the archive does with a record that it cannot keep: two stand-ins take down what it asks of its servers."""

from types import SimpleNamespace
from typing import Any

import pytest

from app.engine.archive import GROUP, Archive
from app.engine.task import _whole

RECORD = {
    "name": "n", "status": "SUCCESS", "queue": "q", "request_id": "r", "owner": "", "digest": "d", "attempts": "1",
    "created_at": "1", "epoch": "1", "version": "7",
}  # fmt: skip


class Servers:
    """Redis and MongoDB, as far as the archive writes to them."""

    def __init__(self, records: dict[str, dict[str, str]], refused: dict[int, str]) -> None:
        self.known, self.answer = records, refused
        self.stored: list[str] = []
        self.settled: list[tuple[str, str, str]] = []
        self.set_aside: list[str] = []
        self.redis = SimpleNamespace(xadd=self.xadd)

    async def records(self, ids: list[str]) -> list[dict[str, str]]:
        return [self.known.get(task_id, {}) for task_id in ids]

    async def store(self, documents: list[dict[str, Any]]) -> dict[int, str]:
        self.stored = [document["task_id"] for document in documents]
        return self.answer

    async def archived(self, group: str, rows: list[tuple[str, str, str]]) -> None:
        assert group == GROUP
        self.settled = rows

    async def xadd(self, _name: str, fields: dict[str, str], maxlen: int) -> None:
        assert maxlen
        self.set_aside.append(fields["id"])


async def archived(records: dict[str, dict[str, str]], refused: dict[int, str] | None = None) -> Servers:
    servers = Servers(records, refused or {})
    entries = [(f"{number}-0", {"id": task_id}) for number, task_id in enumerate(records)]
    await Archive(servers, servers, reader="r", batch=9)._write(entries)  # noqa: SLF001
    return servers


async def test_what_mongodb_has_may_expire():
    servers = await archived({"a": RECORD, "b": RECORD})
    assert servers.stored == ["a", "b"]
    assert servers.settled == [("0-0", "a", "7"), ("1-0", "b", "7")]
    assert not servers.set_aside


@pytest.mark.parametrize("odd", [{}, {**RECORD, "status": "PENDING"}, {**RECORD, "status": "RETRY"}])
async def test_what_is_gone_or_was_reopened_is_passed_over(odd: dict[str, str]):
    servers = await archived({"odd": odd, "a": RECORD})
    assert servers.stored == ["a"]
    # No version: the entry is forgotten, the record may not expire.
    assert servers.settled == [("0-0", "odd", ""), ("1-0", "a", "7")]
    assert not servers.set_aside


@pytest.mark.parametrize("odd", [{"total": "1", "current": "0.5"}, {"created_at": "x"}, {"result": "{"}])
async def test_a_record_that_cannot_be_read_is_set_aside_and_stops_nothing(odd: dict[str, str]):
    servers = await archived({"odd": {**RECORD, **odd}, "a": RECORD})
    assert servers.stored == ["a"]
    assert servers.settled == [("0-0", "odd", ""), ("1-0", "a", "7")]
    assert servers.set_aside == ["odd"]


async def test_what_mongodb_refused_may_not_expire():
    servers = await archived({"a": RECORD, "b": RECORD}, refused={1: "too large"})
    assert servers.settled == [("0-0", "a", "7"), ("1-0", "b", "")]
    assert servers.set_aside == ["b"]


@pytest.mark.parametrize(("told", "kept"), [(0.5, 0), (7, 7), (-1, 0), (2**64, 2**53), (True, 1)])
def test_progress_is_kept_as_a_number_that_all_can_hold(told: float, kept: int):
    assert _whole(told) == kept
