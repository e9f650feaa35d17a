"""The collections `schedules` and `schedule_fires`."""

import asyncio
import random
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

from bson import ObjectId
from pymongo import ASCENDING, DESCENDING, IndexModel, ReturnDocument
from pymongo.errors import DuplicateKeyError

from app import problems
from app.database.documents import DUPLICATE_KEY, Document, present, refusals

INDEXES = [
    IndexModel([("identity", ASCENDING)], unique=True),
    IndexModel([("next_run", ASCENDING)]),
    IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0),
]
FIRE_INDEXES = [
    IndexModel([("schedule_id", ASCENDING), ("fire_time", ASCENDING)], unique=True),
    IndexModel([("schedule_id", ASCENDING), ("_id", ASCENDING)]),
    IndexModel([("status", ASCENDING), ("schedule_id", ASCENDING)]),
    IndexModel([("retry_at", ASCENDING)]),
    IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0),
]
PRESENT = {"deleted_at": None}
PUBLISHED = "published"
CHANGE_ATTEMPTS = 10
CHANGE_PAUSE = 0.02  # seconds at most between two attempts
RETRY_PAUSES = (1, 2, 5)  # seconds until a fire that could not be published is tried again; then always the last


class ScheduleRepository:
    """The collection `schedules`. All methods raise `pymongo.errors.PyMongoError` when MongoDB cannot serve.

    `version` counts changes by clients; `next_run`, none where it is not enabled, is also moved by `advance`.
    `identity` and `digest` are the request that made it, `edge` the one that changed it last. A deleted one stays for
    `identity_ttl` seconds, out of sight, so that neither request is taken for a new one.
    """

    def __init__(self, database: Any, *, identity_ttl: float) -> None:
        self._schedules = database["schedules"]
        self._identity_ttl = timedelta(seconds=identity_ttl)

    async def create(self, fields: Document, *, identity: str, digest: str) -> tuple[Document, bool]:
        """Insert a schedule; answers it and whether it is new: where not, as it is by now."""
        now = present()
        row = {
            "_id": ObjectId(), **fields, "version": 1, "identity": identity, "digest": digest, "edge": "",
            "created_at": now, "updated_at": now, "last_run": None, "deleted_at": None,
        }  # fmt: skip
        try:
            await self._schedules.insert_one(row)
        except DuplicateKeyError:
            earlier: Document | None = await self._schedules.find_one({"identity": identity})
            if earlier is None:
                raise
            return earlier, False
        return row, True

    async def page(self, *, limit: int, after: ObjectId | None) -> list[Document]:
        """At most `limit` schedules in the order they were made, those after the id `after`."""
        query: Document = {**PRESENT, **({} if after is None else {"_id": {"$gt": after}})}
        rows: list[Document] = await self._schedules.find(query).sort("_id", ASCENDING).limit(limit).to_list(limit)
        return rows

    async def get(self, schedule_id: ObjectId) -> Document | None:
        """One schedule, or None."""
        row: Document | None = await self._schedules.find_one({"_id": schedule_id, **PRESENT})
        return row

    async def change(
        self,
        schedule_id: ObjectId,
        fields: Callable[[Document], Document],
        *,
        versions: Sequence[int] | None,
        edge: str,
    ) -> Document | None:
        """Set the `fields` that are made of the present schedule; answers the new one, None where there is none.

        What the request `edge` has changed last is not changed again. Raises `PreconditionFailed` unless it is at one
        of `versions` (any, where None), and `Conflict`.
        """
        for attempt in range(CHANGE_ATTEMPTS):
            row = await self.get(schedule_id)
            if row is None or row["edge"] == edge:
                return row
            if versions is not None and row["version"] not in versions:
                raise problems.PreconditionFailed
            changed = await self._set(row, {**fields(row), "updated_at": present()}, edge)
            if changed is not None:
                return changed
            await asyncio.sleep(random.uniform(0, CHANGE_PAUSE * attempt))  # noqa: S311  not for secrets
        raise problems.Conflict("The schedule changes faster than this request can be applied; try again.")

    async def delete(self, schedule_id: ObjectId, *, versions: Sequence[int] | None, edge: str) -> bool:
        """Delete a schedule; False where there is none, unless `edge` has deleted it. Raises as `change`."""
        now = present()
        gone = {"enabled": False, "next_run": None, "deleted_at": now, "expires_at": now + self._identity_ttl}
        if await self.change(schedule_id, lambda _: gone, versions=versions, edge=edge) is not None:
            return True
        return await self._schedules.find_one({"_id": schedule_id, "edge": edge}) is not None

    async def due(self, now: datetime, limit: int) -> list[Document]:
        """At most `limit` schedules whose time has come."""
        rows: list[Document] = await self._schedules.find({"next_run": {"$lte": now}}).limit(limit).to_list(limit)
        return rows

    async def advance(self, row: Document, *, next_run: datetime | None, last_run: datetime | None) -> bool:
        """Move a schedule on, unless it was changed or moved since it was read as `row`."""
        outcome = await self._schedules.update_one(
            {"_id": row["_id"], "version": row["version"], "next_run": row["next_run"]},
            {"$set": {"next_run": next_run, "last_run": last_run or row["last_run"]}},
        )
        return bool(outcome.modified_count)

    async def _set(self, row: Document, fields: Document, edge: str) -> Document | None:
        changed: Document | None = await self._schedules.find_one_and_update(
            {"_id": row["_id"], "version": row["version"], **PRESENT},
            {"$set": {**fields, "edge": edge}, "$inc": {"version": 1}},
            return_document=ReturnDocument.AFTER,
        )
        return changed


class FireRepository:
    """The collection `schedule_fires`: `pending`, then `published` or `refused`, which are kept for `retention_days`.

    All methods raise `pymongo.errors.PyMongoError` when MongoDB cannot serve.
    """

    def __init__(self, database: Any, *, retention_days: int) -> None:
        self._fires = database["schedule_fires"]
        self._retention = timedelta(days=retention_days)

    async def add(self, fires: Sequence[Document]) -> None:
        """Keep fires as `pending`; one that is there already stays as it is."""
        now = present()
        more = {
            "status": "pending", "message": "", "tries": 0, "retry_at": now, "added_at": now, "published_at": None,
        }  # fmt: skip
        failed = await refusals(self._fires.insert_many([{**fire, **more} for fire in fires], ordered=False))
        wrong = [error for error in failed.values() if error["code"] != DUPLICATE_KEY]
        if wrong:
            raise RuntimeError(f"MongoDB refuses a fire: {wrong[0]['errmsg']}")

    async def waiting(self, schedule_id: ObjectId, limit: int) -> int:
        """How many fires of a schedule are pending; stops counting at `limit`."""
        query = {"schedule_id": schedule_id, "status": "pending"}
        count: int = await self._fires.count_documents(query, limit=limit)
        return count

    async def pending(self, now: datetime, limit: int) -> list[Document]:
        """At most `limit` fires that are to be published now."""
        rows: list[Document] = await self._fires.find({"retry_at": {"$lte": now}}).limit(limit).to_list(limit)
        return rows

    async def settle(self, fire: Document, status: str, message: str = "") -> None:
        """Note that a fire was published, or that it never can be."""
        now = present()
        change: Document = {"status": status, "message": message, "retry_at": None, "expires_at": now + self._retention}
        if status == PUBLISHED:
            change["published_at"] = now
        await self._fires.update_one({"_id": fire["_id"], "status": "pending"}, {"$set": change})

    async def postpone(self, fire: Document, message: str) -> None:
        """Try a fire again later, the reason being `message`."""
        pause = RETRY_PAUSES[min(fire["tries"], len(RETRY_PAUSES) - 1)]
        await self._fires.update_one(
            {"_id": fire["_id"], "status": "pending"},
            {"$set": {"retry_at": present() + timedelta(seconds=pause), "message": message}, "$inc": {"tries": 1}},
        )

    async def latest(self, schedule_id: ObjectId, limit: int) -> list[Document]:
        """The latest fires of a schedule, the latest first."""
        found = self._fires.find({"schedule_id": schedule_id}).sort("_id", DESCENDING).limit(limit)
        rows: list[Document] = await found.to_list(limit)
        return rows
