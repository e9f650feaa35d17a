"""What the archive does with a record that it cannot keep: two stand-ins take down what it asks of its servers."""

from types import SimpleNamespace
from typing import Any

import pytest

from app.engine.archive import GROUP, Archive, failure_event
from app.engine.dead_letters import letter
from app.engine.publisher import Refused
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
        self.letters: list[str] = []
        self.told: list[str] = []
        self.broker_away = False
        self.redis = SimpleNamespace(xadd=self.xadd)

    async def records(self, ids: list[str]) -> list[dict[str, str]]:
        return [self.known.get(task_id, {}) for task_id in ids]

    async def store(self, documents: list[dict[str, Any]]) -> dict[int, str]:
        self.stored = [document["task_id"] for document in documents]
        return self.answer

    async def archived(self, group: str, rows: list[tuple[str, str, str]]) -> None:
        assert group == GROUP
        self.settled = rows

    async def add(self, letters: list[dict[str, Any]]) -> None:
        self.letters += [letter["task_id"] for letter in letters]

    async def emit(self, event: dict[str, Any]) -> None:
        if self.broker_away:
            raise Refused
        self.told.append(event["data"]["task_id"])

    async def xadd(self, _name: str, fields: dict[str, str], maxlen: int) -> None:
        assert maxlen
        self.set_aside.append(fields["id"])


async def archived(
    records: dict[str, dict[str, str]], refused: dict[int, str] | None = None, *, broker_away: bool = False
) -> Servers:
    servers = Servers(records, refused or {})
    servers.broker_away = broker_away
    entries = [(f"{number}-0", {"id": task_id}) for number, task_id in enumerate(records)]
    await Archive(servers, servers, servers, servers, reader="r", batch=9)._write(entries)  # noqa: SLF001
    return servers


async def test_what_mongodb_has_may_expire():
    servers = await archived({"a": RECORD, "b": RECORD})
    assert servers.stored == ["a", "b"]
    assert servers.settled == [("0-0", "a", "7"), ("1-0", "b", "7")]
    assert not servers.set_aside


FAILED = {**RECORD, "status": "FAILURE", "error": '{"type":"t","message":"m"}', "payload": "{}", "finished_at": "2"}


async def test_a_failure_has_a_letter_and_an_event_and_what_was_never_taken_in_has_not():
    servers = await archived({"a": RECORD, "b": FAILED, "c": {**FAILED, "unpublished": "1"}})
    assert servers.letters == servers.told == ["b"]
    assert [row[1] for row in servers.settled] == ["a", "b", "c"]


async def test_a_failure_whose_event_the_broker_does_not_take_is_taken_up_again():
    servers = await archived({"a": RECORD, "b": FAILED, "c": RECORD}, broker_away=True)
    assert servers.stored == ["a", "b", "c"]
    assert [row[1] for row in servers.settled] == ["a", "c"]


def test_the_event_of_a_failure_is_a_cloudevent_without_the_payload():
    failed = letter("a", {**FAILED, "reason": "permanent"})
    event = failure_event(failed)
    assert (event["specversion"], event["type"], event["id"]) == ("1.0", "task.failed", "a:1")
    assert event["time"] == "1970-01-01T00:00:00.002Z"
    assert event["data"]["reason"] == "permanent"
    assert "message" not in event["data"]


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
