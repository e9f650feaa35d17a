"""The collection `outbox`: events that were written with the change they tell of, until they have been published."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from bson import ObjectId
from pymongo import ASCENDING, IndexModel

from app.contracts import EVENTS, EventName, Payload
from app.database.documents import Document, present

INDEXES = [
    IndexModel([("state", ASCENDING), ("_id", ASCENDING)]),
    IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0),
]
WAITING, PUBLISHED = "waiting", "published"


def row(kind: EventName, data: Payload, *, source: str) -> Document:
    """What to insert in the transaction of the change; its `_id` is the event's id."""
    return {
        "_id": ObjectId(),
        "state": WAITING,
        "type": str(kind),
        "dataversion": EVENTS[kind].version,
        "source": source,
        "time": present(),
        "data": data.model_dump_json(),  # as text: BSON cannot say all that JSON can
    }


class OutboxRepository:
    """The collection `outbox`. All methods raise `pymongo.errors.PyMongoError` when MongoDB cannot serve.

    What has been published is kept for `ttl` seconds, to be looked at.
    """

    def __init__(self, database: Any, *, ttl: float) -> None:
        self._outbox = database["outbox"]
        self._ttl = timedelta(seconds=ttl)

    async def waiting(self, limit: int) -> list[Document]:
        """At most `limit` rows that were not published, oldest first."""
        found = self._outbox.find({"state": WAITING}).sort("_id", ASCENDING).limit(limit)
        rows: list[Document] = await found.to_list(limit)
        return rows

    async def published(self, row_ids: Sequence[ObjectId]) -> None:
        """Note that these have been published."""
        change = {"$set": {"state": PUBLISHED, "expires_at": present() + self._ttl}}
        await self._outbox.update_many({"_id": {"$in": list(row_ids)}}, change)
