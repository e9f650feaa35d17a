"""Running a job's steps in a worker: each is kept, so that what comes after a killed one goes on where it was."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

from app.database import JobLog, new_job
from app.engine.backend import patiently
from app.engine.errors import ResultTooLargeError
from app.engine.jobs import job_of
from app.engine.message import Message
from app.engine.record import encode_result
from app.engine.task import Cancelled, Superseded, Task


class Outcome(NamedTuple):
    """What a step has done, in words and for the next step (JSON of at most RESULT_MAX_BYTES)."""

    message: str
    result: Any


@dataclass(frozen=True, slots=True)
class Job:
    """What a step may use: the job's id and payload, the step's number, and `tell`.

    `tell(fraction)` says how far the step has come, 0 to 1; call it every few seconds, since it is where a cancelled
    job stops.
    """

    id: str
    number: int
    payload: Any
    tell: Callable[[float], None]


# Of a job and the result of the step before; may run twice, so that a second run must do no harm.
Work = Callable[[Job, Any], Outcome]


def run_steps(  # noqa: PLR0913  what the task knows and the engine does not
    task: Task, steps: Sequence[tuple[str, Work]], *, name: str, payload: Any, database: Any, retention_days: int
) -> dict[str, Any]:
    """Run the steps of the job that is the present run of `task`; those that a run before has completed are kept.

    What a step raises is the task's failure or next attempt. Raises `Superseded` where another run has taken over, and
    `Cancelled`.
    """
    message: Message = task.request.started
    log = JobLog(
        database,
        new_job(
            job_id=job_of(message.task_id),
            task_id=message.task_id,
            name=name,
            owner=message.owner,
            created_at=datetime.fromtimestamp(message.created_at / 1000, UTC),
        ),
        epoch=message.epoch,
        retention_days=retention_days,
    )
    run = StepRun(task, message, log, total=len(steps))
    return run(steps, payload)


class StepRun:
    """One run of a job."""

    def __init__(self, task: Task, message: Message, log: JobLog, *, total: int) -> None:
        self._task = task
        self._message = message
        self._log = log
        self._total = total

    def __call__(self, steps: Sequence[tuple[str, Work]], payload: Any) -> dict[str, Any]:
        """Run what is left; answers the task's result."""
        job_id = job_of(self._message.task_id)
        if self._take():
            kept = self._patiently(self._log.kept)
            text, said = "null", ""
            for number, (name, work) in enumerate(steps, start=1):
                if number in kept:
                    text = kept[number]["result"]
                    continue
                self._hold(partial(self._log.begin, number, name))
                job = Job(job_id, number, payload, partial(self._tell, number))
                said, result = work(job, json.loads(text))
                text = self._encoded(result)
                self._hold(partial(self._log.complete, number, said, text))
            self._hold(lambda: self._log.finish("All steps are done.", text))
        return {"job_id": job_id, "status": "COMPLETED", "steps": len(steps)}

    def _take(self) -> bool:
        """Take the job for this run; False where it is done.

        The number is drawn before Redis is asked whether this is still the task's run. So of two runs that were told
        so, the later one has the higher number, and a run that comes late draws one that never counts.
        """
        self._patiently(self._log.claim)
        if self._patiently(self._log.done):
            return False
        store = self._task.backend.store
        answer = self._patiently(lambda: store.progress(self._message, 0, self._total * 100))
        if answer == "cancel":
            raise Cancelled
        if answer == "lost":
            raise Superseded
        if not self._patiently(self._log.take):
            if self._patiently(self._log.done):
                return False  # by the run before, between our look and our taking it
            raise Superseded
        return True

    def _tell(self, number: int, part: float) -> None:
        self._task.progress((number - 1 + min(max(part, 0), 1)) * 100, self._total * 100)

    def _hold(self, write: Callable[[], bool]) -> None:
        if not self._patiently(write):
            raise Superseded

    def _patiently(self, call: Callable[[], Any]) -> Any:
        return patiently(call, self._task.backend.patience)

    def _encoded(self, result: Any) -> str:
        encoded = encode_result(result)
        if len(encoded) > self._task.result_max_bytes:
            raise ResultTooLargeError(
                f"A step's result has {len(encoded)} bytes, {self._task.result_max_bytes} are allowed."
            )
        return encoded.decode()
