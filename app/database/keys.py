"""The collection `api_keys`."""

from typing import Any

from pymongo import DESCENDING, ReturnDocument

from app.database.documents import Document, present


class KeyRepository:
    """The collection `api_keys`: what is known of each API key but the key itself; see `engine.keys`.

    All methods raise `pymongo.errors.PyMongoError` when MongoDB cannot serve.
    """

    def __init__(self, database: Any) -> None:
        self._keys = database["api_keys"]

    async def add(self, document: Document) -> None:
        """Keep a new key."""
        await self._keys.insert_one(document)

    async def get(self, key_id: str) -> Document | None:
        """The document of a key, or None."""
        key: Document | None = await self._keys.find_one({"_id": key_id})
        return key

    async def all(self, limit: int) -> list[Document]:
        """The newest `limit` keys, oldest first; those that were revoked or have expired too."""
        rows: list[Document] = await self._keys.find().sort("_id", DESCENDING).limit(limit).to_list(limit)
        return rows[::-1]

    async def revoke(self, key_id: str) -> Document | None:
        """End a key's use, if it has not ended; answers its document, or None for an unknown one."""
        change = {"$set": {"revoked_at": present()}}
        revoked: Document | None = await self._keys.find_one_and_update(
            {"_id": key_id, "revoked_at": None}, change, return_document=ReturnDocument.AFTER
        )
        return revoked or await self.get(key_id)
