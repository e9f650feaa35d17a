"""Jobs as API and beat see them. A job is a task; its document tells what the task has done, and is made of it."""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import orjson
import structlog
from pymongo.errors import PyMongoError

from app import problems
from app.contracts import RunJob, TaskName
from app.database import Document, JobRepository, new_job
from app.database.documents import present
from app.engine.identity import Principal
from app.engine.record import Status
from app.engine.service import NOT_PUBLISHED, Accepted, TaskService
from app.engine.state import AsyncTaskStore

log = structlog.get_logger(__name__)

NO_JOB = "There is no job with this id."
# Flips bits of a task's id: the job has an id of its own, and whoever knows one of the two knows the other.
JOB = int.from_bytes(b"job", "big")
STATUS = {
    Status.PENDING: "PENDING",
    Status.SUCCESS: "COMPLETED",
    Status.FAILURE: "FAILED",
    Status.CANCELLED: "FAILED",
}


def job_of(task_id: str) -> str:
    """The id of the job that a task is; `job_of` of that is the task's id again."""
    return str(UUID(int=UUID(task_id).int ^ JOB))


class Jobs:
    """Takes jobs in, tells of them, and ends those whose task has ended otherwise than well."""

    def __init__(self, tasks: TaskService, store: AsyncTaskStore, jobs: JobRepository, *, timeout: float) -> None:
        self._tasks = tasks
        self._store = store
        self._jobs = jobs
        self._timeout = timeout

    async def submit(  # noqa: PLR0913  all that makes a task
        self, order: RunJob, *, task_id: str, digest: str, request_id: str, owner: str, keyed: bool
    ) -> Accepted:
        """Submit a job's task, then write its document; see `TaskService.submit`, whose problems this raises.

        The task's payload has what the document is made of: where it cannot be written, the worker writes it.
        """
        accepted = await self._tasks.submit(
            TaskName.RUN_JOB,
            order.model_dump(mode="json"),
            task_id=task_id,
            digest=digest,
            request_id=request_id,
            owner=owner,
            keyed=keyed,
        )
        if not accepted.replayed:
            job = new_job(job_id=job_of(task_id), task_id=task_id, name=order.name, owner=owner, created_at=present())
            try:
                await asyncio.wait_for(self._jobs.open(job), self._timeout)
            except (TimeoutError, PyMongoError) as error:
                log.warning("a job's document is left to its worker", task_id=task_id, error=type(error).__name__)
        return accepted

    async def get(self, job_id: str, principal: Principal) -> Document:
        """A job with its steps; what its task tells where the document is not there yet.

        Raises `NotFound`, also for a job of somebody else, and `Unavailable`.
        """
        job = await self._jobs.get(job_id)
        if job is None:
            return await self._of_task(job_id, principal)
        if not principal.may_see(job["owner"]):
            raise problems.NotFound(NO_JOB)
        return {**job, "steps": await self._jobs.steps(job_id)}

    async def page(
        self, principal: Principal, *, limit: int, before: str | None, status: str | None
    ) -> Sequence[Document]:
        """A page of the jobs of who asks, of all jobs for an admin; the latest first."""
        owner = None if principal.admin else principal.id
        return await self._jobs.page(limit=limit, before=before, status=status, owner=owner)

    async def follow(self, documents: Sequence[Mapping[str, Any]]) -> None:
        """End the jobs whose tasks have failed or were cancelled: a follower of the archive.

        Raises `RedisError` or `PyMongoError`; it is then told again.
        """
        dead = [document for document in documents if _ends_a_job(document)]
        # They still have their records, which alone know the names of jobs that have no document yet.
        records = await self._store.records([document["task_id"] for document in dead]) if dead else []
        for document, record in zip(dead, records, strict=True):
            task_id = document["task_id"]
            job = new_job(
                job_id=job_of(task_id),
                task_id=task_id,
                name=_name(record),
                owner=document["owner"],
                created_at=datetime.fromisoformat(document["created_at"]),
            )
            at = datetime.fromisoformat(document["finished_at"])
            if await self._jobs.fail(job, epoch=document["epoch"], message=_message(document), at=at):
                log.info("a job has failed", job_id=job["job_id"], task_id=task_id, status=document["status"])

    async def _of_task(self, job_id: str, principal: Principal) -> Document:
        try:
            task = await self._tasks.status(job_of(job_id), principal)
        except problems.NotFound as error:
            raise problems.NotFound(NO_JOB) from error
        if task["name"] != TaskName.RUN_JOB:
            raise problems.NotFound(NO_JOB)
        return {
            **task,
            "job_id": job_id,
            "name": None,
            "status": STATUS.get(task["status"], "IN_PROGRESS"),
            "message": _message(task),
            "completed_at": task["finished_at"],
            "result": None,
            "steps": [],
        }


def _ends_a_job(document: Mapping[str, Any]) -> bool:
    if document["name"] != TaskName.RUN_JOB or document["status"] == Status.SUCCESS:
        return False
    # What was never published was answered 503: there is no job.
    return (document["error"] or {}).get("type") != NOT_PUBLISHED


def _message(task: Mapping[str, Any]) -> str:
    return str((task["error"] or {}).get("message") or "")


def _name(record: Mapping[str, str]) -> str:
    try:
        return str(orjson.loads(record["payload"])["name"])[:200]
    except (KeyError, TypeError, ValueError):
        return ""  # the record is gone, or the payload did not fit
