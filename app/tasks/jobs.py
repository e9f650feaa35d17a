"""A job of three steps. Example to replace by your own: the functions, and their order in `STEPS`."""

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

from app.celery_app import celery
from app.context import worker_context
from app.contracts import Rehearsal, RunJob, TaskName
from app.database import JobOutputs
from app.engine.errors import PermanentError
from app.engine.steps import Job, Outcome, Work, run_steps
from app.engine.task import HeavyTask

TICK = 0.05  # seconds between two looks of a rehearsal whether it is to stop


def fetch(job: Job, _before: Any) -> Outcome:
    """Fetch what the job is about; here it is in the payload: rows of name and value."""
    rows = [[name, value] for name, value in sorted(job.payload.items())]
    return Outcome(f"{len(rows)} rows fetched.", rows)


def transform(_job: Job, before: Any) -> Outcome:
    """Make of each row its SHA-256, and one over all."""
    digests = {name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() for name, value in before}
    total = hashlib.sha256("".join(digests.values()).encode()).hexdigest()
    return Outcome(f"{len(digests)} rows transformed.", {"rows": len(digests), "checksum": total})


def store(job: Job, before: Any) -> Outcome:
    """Keep the outcome where others look for it; under the job's id, so that to do it twice is to do it once."""
    context = worker_context()
    JobOutputs(context.database, retention_days=context.settings.job_retention_days).put(job.id, before)
    return Outcome("1 document stored.", before)


STEPS: tuple[tuple[str, Work], ...] = (("fetch", fetch), ("transform", transform), ("store", store))


@celery.task(name=TaskName.RUN_JOB, base=HeavyTask, bind=True, pydantic=True)
def run_job(self: HeavyTask, payload: RunJob) -> dict[str, Any]:
    """Run `STEPS` over the payload; see `engine.steps`."""
    context = worker_context()
    return run_steps(
        self,
        [(name, rehearsed(work, payload.rehearsal, self.request.started.run)) for name, work in STEPS],
        name=payload.name,
        payload=payload.payload,
        database=context.database,
        retention_days=context.settings.job_retention_days,
    )


def rehearsed(work: Work, rehearsal: Rehearsal, run: int) -> Work:
    """`work`, but slow or failing as the rehearsal has it in the run number `run` of the task."""

    def perform(job: Job, before: Any) -> Outcome:
        wait(rehearsal.seconds, job.tell)
        if job.number == rehearsal.step and run <= rehearsal.failures:
            error = PermanentError if rehearsal.permanent else OSError
            raise error(f"Step {job.number} was asked to fail in run {run}.")
        return work(job, before)

    return perform


def wait(seconds: float, tell: Callable[[float], None]) -> None:
    """Take `seconds`, and tell of it."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(TICK, left))
        tell(max(0.0, 1 - left / seconds))
