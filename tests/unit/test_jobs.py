import json
from typing import Any
from uuid import UUID, uuid4

import pytest

from app.contracts import Rehearsal
from app.engine.errors import PermanentError
from app.engine.jobs import Jobs, job_of
from app.engine.steps import Job, Outcome
from app.tasks.jobs import fetch, rehearsed, transform

RECORD = {"payload": json.dumps({"name": "nightly"})}
DEAD = {
    "task_id": str(uuid4()),
    "name": "jobs.run",
    "status": "FAILURE",
    "error": {"type": "OSError", "message": "no"},
    "epoch": 2,
    "owner": "key",
    "created_at": "2026-01-02T03:04:05.678Z",
    "finished_at": "2026-01-02T03:05:05.678Z",
}


class Servers:
    """The records, and the jobs that were ended."""

    def __init__(self, record: dict[str, str]) -> None:
        self.record = record
        self.failed: list[tuple[str, str, int, str]] = []

    async def records(self, ids: list[str]) -> list[dict[str, str]]:
        return [self.record for _ in ids]

    async def fail(self, job: dict[str, Any], *, epoch: int, message: str, at: Any) -> bool:
        assert at.isoformat() == "2026-01-02T03:05:05.678000+00:00"
        self.failed.append((job["job_id"], job["name"], epoch, message))
        return True


async def followed(*documents: dict[str, Any], record: dict[str, str] | None = None) -> list[tuple[str, str, int, str]]:
    servers = Servers(RECORD if record is None else record)
    await Jobs(servers, servers, servers, timeout=1).follow(documents)
    return servers.failed


def job(number: int = 1, payload: Any = None) -> Job:
    return Job("j", number, payload, lambda _: None)


def test_a_job_has_an_id_of_its_own_that_tells_its_task() -> None:
    task_id = str(uuid4())
    assert job_of(task_id) != task_id
    assert job_of(job_of(task_id)) == task_id
    assert UUID(job_of(task_id)).version == 4


async def test_a_job_ends_with_its_task() -> None:
    cancelled = {**DEAD, "task_id": str(uuid4()), "status": "CANCELLED", "error": None}
    assert await followed(DEAD, cancelled) == [
        (job_of(DEAD["task_id"]), "nightly", 2, "no"),
        (job_of(cancelled["task_id"]), "nightly", 2, ""),
    ]


@pytest.mark.parametrize(
    "other",
    [{"status": "SUCCESS"}, {"name": "light.count_words"}, {"error": {"type": "not_published", "message": "no"}}],
)
async def test_other_ends_end_no_job(other: dict[str, Any]) -> None:
    assert await followed({**DEAD, **other}) == []


@pytest.mark.parametrize("record", [{}, {"payload": "{"}, {"payload": "[]"}, {"payload": "{}"}])
async def test_a_job_whose_name_is_lost_still_ends(record: dict[str, str]) -> None:
    assert await followed(DEAD, record=record) == [(job_of(DEAD["task_id"]), "", 2, "no")]


def test_the_steps_do_not_depend_on_the_order_in_which_the_payload_came() -> None:
    results = [
        transform(job(), fetch(job(payload=payload), None).result) for payload in ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    ]
    assert results[0] == results[1]
    assert results[0].result["rows"] == 2


def test_a_rehearsed_step_fails_in_the_runs_that_were_asked_for() -> None:
    def work(_job: Job, before: Any) -> Outcome:
        return Outcome("", before)

    rehearsal = Rehearsal(step=2, failures=2)
    assert rehearsed(work, rehearsal, 1)(job(1), "x").result == "x"
    for run in (1, 2):
        with pytest.raises(OSError, match=f"run {run}"):
            rehearsed(work, rehearsal, run)(job(2), "x")
    assert rehearsed(work, rehearsal, 3)(job(2), "x").result == "x"
    with pytest.raises(PermanentError):
        rehearsed(work, Rehearsal(step=1, permanent=True), 1)(job(1), "x")
