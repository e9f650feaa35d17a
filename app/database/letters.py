"""The collection `dead_letters`."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal

import structlog
from bson import ObjectId
from pymongo import ASCENDING, DESCENDING, IndexModel

from app.database.documents import DUPLICATE_KEY, Document, given, present, refusals

log = structlog.get_logger(__name__)

INDEXES = [
    IndexModel([("key", ASCENDING)], unique=True),
    IndexModel([("state", ASCENDING), ("_id", ASCENDING)]),
    IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0),
]


class DeadLetterRepository:
    """The collection `dead_letters`: what failed for good, `open` until it is `replayed` or `discarded`.

    Kept for `retention_days`. All methods raise `pymongo.errors.PyMongoError` when MongoDB cannot serve.
    """

    def __init__(self, database: Any, *, retention_days: int) -> None:
        self._letters = database["dead_letters"]
        self._retention = timedelta(days=retention_days)

    async def add(self, letters: Sequence[Document]) -> None:
        """Keep letters, as `engine.dead_letters.letter` makes them; one whose `key` is there already stays.

        What MongoDB refuses is not kept: its place in the log is what remains.
        """
        if not letters:
            return
        expires_at = present() + self._retention
        rows = [
            {**letter, "state": "open", "settled_at": None, "settled_by": None, "expires_at": expires_at}
            for letter in letters
        ]
        failed = await refusals(self._letters.insert_many(rows, ordered=False))
        for index, error in failed.items():
            if error["code"] != DUPLICATE_KEY:
                log.error("a dead letter cannot be kept", key=letters[index]["key"], reason=error["errmsg"])

    async def page(
        self, *, limit: int, before: ObjectId | None, state: str | None, name: str | None, queue: str | None
    ) -> list[Document]:
        """At most `limit` letters, the latest first, those before the id `before`."""
        query = given(state=state, name=name, queue=queue)
        if before is not None:
            query["_id"] = {"$lt": before}
        rows: list[Document] = await self._letters.find(query).sort("_id", DESCENDING).limit(limit).to_list(limit)
        return rows

    async def get(self, letter_id: ObjectId) -> Document | None:
        """One letter, or None."""
        row: Document | None = await self._letters.find_one({"_id": letter_id})
        return row

    async def count(self, *, name: str | None, queue: str | None) -> int:
        """How many letters are open."""
        count: int = await self._letters.count_documents(given(state="open", name=name, queue=queue))
        return count

    async def settle(self, letter_id: ObjectId, state: Literal["replayed", "discarded"], *, by: str) -> bool:
        """Note what was done with an open letter, and by whom; False if it is open no longer.

        Of one that was discarded while its replay left, the replay counts: the task runs.
        """
        change = {"$set": {"state": state, "settled_at": present(), "settled_by": by}}
        before = {"$ne": "replayed"} if state == "replayed" else "open"
        outcome = await self._letters.update_one({"_id": letter_id, "state": before}, change)
        return bool(outcome.modified_count)
