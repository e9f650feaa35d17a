"""The collection `event_markers`: which service has handled which event, or failed at it."""

from datetime import timedelta
from typing import Any

from pymongo import ASCENDING, IndexModel, ReturnDocument
from pymongo.errors import DuplicateKeyError

from app.database.documents import Document, present

INDEXES = [IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0)]
HANDLED, FAILING = "handled", "failing"


class AlreadyHandledError(Exception):
    """The service has handled this event before."""


class MarkerRepository:
    """The collection `event_markers`, one document a service and event, for `days`.

    All methods raise `pymongo.errors.PyMongoError` when MongoDB cannot serve.
    """

    def __init__(self, database: Any, *, days: int) -> None:
        self._markers = database["event_markers"]
        self._kept = timedelta(days=days)

    async def mark(self, marker: str, *, session: Any) -> None:
        """Note, in the transaction of the effect, that the event has had it. Raises `AlreadyHandledError`."""
        change = {"$set": {"state": HANDLED, "expires_at": present() + self._kept}}
        try:
            # A handled one does not match, and cannot be inserted a second time.
            await self._markers.update_one(
                {"_id": marker, "state": {"$ne": HANDLED}}, change, upsert=True, session=session
            )
        except DuplicateKeyError as error:
            raise AlreadyHandledError(marker) from error

    async def failed(self, marker: str, error: Document, *, reason: str) -> int:
        """Note a failed attempt for the dead letter that may follow; answers how many there have been."""
        change = {
            "$set": {"state": FAILING, "error": error, "reason": reason, "expires_at": present() + self._kept},
            "$inc": {"attempts": 1},
        }
        try:
            row: Document = await self._markers.find_one_and_update(
                {"_id": marker, "state": {"$ne": HANDLED}}, change, upsert=True, return_document=ReturnDocument.AFTER
            )
        except DuplicateKeyError as duplicate:
            raise AlreadyHandledError(marker) from duplicate
        return int(row["attempts"])

    async def failure(self, marker: str) -> Document | None:
        """What is known of the attempts at an event that was not handled: `error`, `reason` and `attempts`, or None."""
        row: Document | None = await self._markers.find_one({"_id": marker, "state": FAILING})
        return row
