"""The collections `jobs` and `job_steps`."""

from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

from pymongo import ASCENDING, DESCENDING, IndexModel, ReturnDocument
from pymongo.client_session import ClientSession
from pymongo.errors import DuplicateKeyError, OperationFailure

from app.database.documents import Document, given, present

INDEXES = [
    IndexModel([("job_id", ASCENDING)], unique=True),
    IndexModel([("task_id", ASCENDING)]),
    IndexModel([("status", ASCENDING), ("_id", ASCENDING)]),
    IndexModel([("owner", ASCENDING), ("_id", ASCENDING)]),
    IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0),
]
OUTPUT_INDEXES = [IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0)]
STEP_INDEXES = [
    IndexModel([("job_id", ASCENDING), ("step_number", ASCENDING)], unique=True),
    IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0),
]


def new_job(*, job_id: str, task_id: str, name: str, owner: str, created_at: datetime) -> Document:
    """A job's document as it begins, the same whoever writes it first: API, worker, or who ends it.

    `_id` puts pages by `_id` in the order of creation. `claims` counts the runs that came, `run` is the one that may
    write, in the epoch `epoch` of its task; `ended` is the last epoch whose end is known. `writes` counts.
    """
    return {
        "_id": f"{created_at.isoformat(timespec='milliseconds')}-{job_id}",
        "job_id": job_id, "task_id": task_id, "name": name, "owner": owner,
        "status": "PENDING", "message": "It waits for a worker.", "result": None,
        "created_at": created_at, "started_at": None, "completed_at": None,
        "run": 0, "epoch": 0, "ended": 0,
    }  # fmt: skip


class JobRepository:
    """Jobs and their steps as API and beat see them; kept for `retention_days` after the last write.

    All methods raise `pymongo.errors.PyMongoError` when MongoDB cannot serve.
    """

    def __init__(self, database: Any, *, retention_days: int) -> None:
        self._jobs = database["jobs"]
        self._steps = database["job_steps"]
        self._retention = timedelta(days=retention_days)

    async def open(self, job: Document) -> None:
        """Keep a job, as `new_job` makes it, unless it is there."""
        row = {**job, "claims": 0, "writes": 0, "expires_at": present() + self._retention}
        with suppress(DuplicateKeyError):  # another hand was faster
            await self._jobs.update_one({"job_id": job["job_id"]}, {"$setOnInsert": row}, upsert=True)

    async def get(self, job_id: str) -> Document | None:
        """One job, or None."""
        job: Document | None = await self._jobs.find_one({"job_id": job_id})
        return job

    async def steps(self, job_id: str) -> list[Document]:
        """The steps of a job that have begun, in their order, without their results."""
        rows: list[Document] = await self._steps.find({"job_id": job_id}, {"result": 0}).to_list(None)
        return sorted(rows, key=lambda row: int(row["step_number"]))

    async def page(self, *, limit: int, before: str | None, status: str | None, owner: str | None) -> list[Document]:
        """At most `limit` jobs, the latest first, those before the `_id` `before`; of any owner where that is None."""
        query = given(status=status, owner=owner)
        if before is not None:
            query["_id"] = {"$lt": before}
        rows: list[Document] = await self._jobs.find(query).sort("_id", DESCENDING).limit(limit).to_list(limit)
        return rows

    async def fail(self, job: Document, *, epoch: int, message: str, at: datetime) -> bool:
        """End a job, and the step that it was in, since its task has ended so in `epoch`; may be repeated.

        From then on no run of that epoch, or of an earlier one, can write. Answers whether it had an effect: what is
        COMPLETED stays so, and what a later epoch has taken up is left to that.
        """
        await self.open(job)
        place = {"job_id": job["job_id"], "status": {"$ne": "COMPLETED"}, "epoch": {"$lte": epoch}}
        fence = {"epoch": epoch, "ended": epoch, "expires_at": present() + self._retention}
        fenced = await self._jobs.update_one({**place, "ended": {"$lte": epoch}}, {"$set": fence})
        if not fenced.matched_count:
            return False
        # The job last: who reads that it has failed finds the step so, too.
        end = {"status": "FAILED", "message": message, "completed_at": at}
        await self._steps.update_many(
            {"job_id": job["job_id"], "status": "IN_PROGRESS", "epoch": {"$lte": epoch}}, {"$set": end}
        )
        await self._jobs.update_one(place, {"$set": end})
        return True


class JobLog:
    """One job and its steps as a run of its task writes them, without an event loop.

    Each write of a run is one transaction that holds only while the run is the job's: two runs never mix, and one
    that was superseded, or whose task has ended, changes nothing. All methods raise `pymongo.errors.PyMongoError` when
    MongoDB cannot serve, and may be repeated then.
    """

    def __init__(self, database: Any, job: Document, *, epoch: int, retention_days: int) -> None:
        self._client = database.client
        self._jobs = database["jobs"]
        self._steps = database["job_steps"]
        self._job = job
        self._id = job["job_id"]
        self._epoch = epoch
        self._run = 0
        self._retention = timedelta(days=retention_days)

    def claim(self) -> None:
        """Draw this run's number, which counts for nothing before `take`."""
        place = {"job_id": self._id}
        row = {**self._job, "claims": 0, "writes": 0, "expires_at": present() + self._retention}
        # Apart from each other: who loses the race of two inserts is not told the document that won.
        with suppress(DuplicateKeyError):
            self._jobs.update_one(place, {"$setOnInsert": row}, upsert=True)
        job: Document | None = self._jobs.find_one_and_update(
            place, {"$inc": {"claims": 1}}, return_document=ReturnDocument.AFTER
        )
        if job is None:
            raise OperationFailure("a job's document is gone")
        self._run = job["claims"]

    def done(self) -> bool:
        """Whether the job is COMPLETED."""
        return self._jobs.find_one({"job_id": self._id, "status": "COMPLETED"}, {"_id": 1}) is not None

    def take(self) -> bool:
        """Make this run the job's; False where a later one has come, or the epoch's end is known."""
        now = present()
        mine = {"run": {"$lte": self._run}, "ended": {"$lt": self._epoch}, "status": {"$ne": "COMPLETED"}}
        change = {
            "run": self._run, "epoch": self._epoch, "status": "IN_PROGRESS", "message": "It runs.",
            "completed_at": None, "expires_at": now + self._retention,
        }  # fmt: skip
        taken = self._jobs.update_one({"job_id": self._id, **mine}, {"$set": change})
        self._jobs.update_one({"job_id": self._id, "run": self._run, "started_at": None}, {"$set": {"started_at": now}})
        return bool(taken.matched_count)

    def kept(self) -> dict[int, Document]:
        """The steps that are COMPLETED, by number, with their results."""
        return {row["step_number"]: row for row in self._steps.find({"job_id": self._id, "status": "COMPLETED"})}

    def begin(self, number: int, name: str) -> bool:
        """Note that a step begins, now; False for a run that is no longer the job's."""
        began = {"status": "IN_PROGRESS", "message": "", "result": None, "started_at": present(), "completed_at": None}
        return self._write(number, {"name": name, **began})

    def complete(self, number: int, message: str, result: str) -> bool:
        """Note that a step has ended well, with its result (JSON) for the next one; False as `begin`."""
        ended = {"status": "COMPLETED", "message": message, "result": result, "completed_at": present()}
        return self._write(number, ended)

    def finish(self, message: str, result: str) -> bool:
        """End the job well, with its result (JSON); False as `begin`."""
        end = {"status": "COMPLETED", "message": message, "result": result, "completed_at": present()}
        return bool(self._jobs.update_one(self._mine(), {"$set": end}).matched_count)

    def _write(self, number: int, fields: Document) -> bool:
        step = {**fields, "epoch": self._epoch, "expires_at": present() + self._retention}

        def write(session: ClientSession) -> bool:
            # Counting makes it a change of the job, too: who takes or ends it meanwhile comes before or after this.
            if not self._jobs.update_one(self._mine(), {"$inc": {"writes": 1}}, session=session).matched_count:
                return False
            place = {"job_id": self._id, "step_number": number}
            self._steps.update_one(place, {"$set": step}, upsert=True, session=session)
            return True

        return self._transaction(write)

    def _mine(self) -> Document:
        return {"job_id": self._id, "run": self._run, "ended": {"$lt": self._epoch}}

    def _transaction(self, write: Callable[[ClientSession], bool]) -> bool:
        with self._client.start_session() as session:
            return bool(session.with_transaction(write))


class JobOutputs:
    """The collection `job_outputs`, where the example's last step leaves what the job has made, by the job's id.

    Raises `pymongo.errors.PyMongoError` when MongoDB cannot serve.
    """

    def __init__(self, database: Any, *, retention_days: int) -> None:
        self._outputs = database["job_outputs"]
        self._retention = timedelta(days=retention_days)

    def put(self, job_id: str, output: Document) -> None:
        """Keep `output`; once more is the same."""
        row = {**output, "expires_at": present() + self._retention}
        self._outputs.replace_one({"_id": job_id}, row, upsert=True)
