"""The collection `workflows`."""

from collections.abc import Collection, Mapping
from datetime import timedelta
from typing import Any

from bson import ObjectId
from pymongo import ASCENDING, IndexModel
from pymongo.errors import DuplicateKeyError

from app.database.documents import Document, present

# Sparse: a workflow that has ended is not looked at, and those are most.
INDEXES = [
    IndexModel([("workflow_id", ASCENDING)], unique=True),
    IndexModel([("look_at", ASCENDING)], sparse=True),
    IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0),
]
CANCELLABLE = ["PENDING", "STARTED"]


class WorkflowRepository:
    """The collection `workflows`. All methods raise `pymongo.errors.PyMongoError` when MongoDB cannot serve.

    Each change counts `version` up and is made to the version that was read, and to no other. A workflow has a
    `look_at`, when it is to be looked at next, until it has ended; then it is kept for `retention_days`.
    """

    def __init__(self, database: Any, *, retention_days: int) -> None:
        self._workflows = database["workflows"]
        self._retention = timedelta(days=retention_days)

    async def create(self, document: Document, *, look_in: float) -> tuple[Document, bool]:
        """Insert a workflow, to be looked at in `look_in` seconds.

        Answers it, or the one that has its id, and whether it is new.
        """
        now = present()
        new = {
            "_id": ObjectId(), **document, "version": 1, "looks": 0, "look_at": now + timedelta(seconds=look_in),
            "created_at": now, "started_at": None, "finished_at": None,
        }  # fmt: skip
        try:
            await self._workflows.insert_one(new)
        except DuplicateKeyError:
            earlier = await self.get(document["workflow_id"])
            if earlier is None:
                raise
            return earlier, False
        return new, True

    async def get(self, workflow_id: str) -> Document | None:
        """The workflow, or None."""
        found: Document | None = await self._workflows.find_one({"workflow_id": workflow_id})
        return found

    async def count_open(self, limit: int) -> int:
        """How many workflows have not ended, counted up to `limit`."""
        count: int = await self._workflows.count_documents({"look_at": {"$exists": True}}, limit=limit)
        return count

    async def change(self, document: Document, values: Mapping[str, Any], *, look_in: float, looks: int) -> bool:
        """Set `values` (by dotted path) of the version that `document` is; False if there is a later one."""
        now = present()
        looked = {"looks": looks, "look_at": now + timedelta(seconds=look_in)}
        return await self._change(document, {"$set": {**values, **looked, "started_at": document["started_at"] or now}})

    async def end(self, document: Document, values: Mapping[str, Any]) -> bool:
        """Set the last values of a workflow, likewise."""
        now = present()
        last = {**values, "finished_at": now, "expires_at": now + self._retention}
        return await self._change(document, {"$set": last, "$unset": {"look_at": ""}})

    async def cancel(self, workflow_id: str) -> bool:
        """Note that a workflow is to be stopped; False if it has ended, or is being stopped."""
        outcome = await self._workflows.update_one(
            {"workflow_id": workflow_id, "status": {"$in": CANCELLABLE}},
            {"$set": {"cancel": True, "looks": 0, "look_at": present()}, "$inc": {"version": 1}},
        )
        return bool(outcome.matched_count)

    async def reopen(self, workflow_id: str, name: str) -> None:
        """Have a workflow wait once more for the undo of `name`, which it ended without; nothing where it did not."""
        waits = {"status": "COMPENSATING", f"compensations.{name}.status": "PENDING", "finished_at": None}
        await self._workflows.update_one(
            {"workflow_id": workflow_id, "uncompensated": name},
            {
                "$set": {**waits, "looks": 0, "look_at": present()},
                "$unset": {"expires_at": ""},
                "$inc": {"version": 1},
            },
        )

    async def wake(self, workflow_ids: Collection[str]) -> None:
        """Have open workflows looked at now. Whoever is looking at one has to look again: hence the version."""
        await self._workflows.update_many(
            {"workflow_id": {"$in": list(workflow_ids)}, "look_at": {"$exists": True}},
            {"$set": {"look_at": present()}, "$inc": {"version": 1}},
        )

    async def due(self, limit: int) -> list[str]:
        """At most `limit` ids of workflows that are to be looked at now, those that wait longest first."""
        query = {"look_at": {"$lte": present()}}
        rows = (
            await self._workflows.find(query, {"workflow_id": 1}).sort("look_at", ASCENDING).limit(limit).to_list(limit)
        )
        return [row["workflow_id"] for row in rows]

    async def postpone(self, workflow_id: str, *, look_in: float) -> None:
        """Look at an open workflow later, whatever its version."""
        await self._workflows.update_one(
            {"workflow_id": workflow_id, "look_at": {"$exists": True}},
            {"$set": {"look_at": present() + timedelta(seconds=look_in)}, "$inc": {"looks": 1}},
        )

    async def _change(self, document: Document, change: Document) -> bool:
        outcome = await self._workflows.update_one(
            {"_id": document["_id"], "version": document["version"]}, {**change, "$inc": {"version": 1}}
        )
        return bool(outcome.matched_count)
