"""The collection `audit`: the events that the service `audit` has heard of."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from pymongo import ASCENDING, IndexModel

from app.database.documents import present

INDEXES = [IndexModel([("id", ASCENDING)]), IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0)]
KEPT = timedelta(days=30)


class AuditRepository:
    """The collection `audit`, one row an event. Raises `pymongo.errors.PyMongoError` when MongoDB cannot serve."""

    def __init__(self, database: Any) -> None:
        self._audit = database["audit"]

    async def add(self, event: Mapping[str, Any], *, session: Any) -> None:
        """Keep the document of an event. Nothing here makes it unique: its marker, in the same transaction, does."""
        await self._audit.insert_one({**event, "expires_at": present() + KEPT}, session=session)
