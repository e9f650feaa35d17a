"""The collection `newcomers`, as workers use it: without an event loop."""

from typing import Any

from pymongo import ReturnDocument
from pymongo.errors import DuplicateKeyError

from app.database.documents import Document, present


class NewcomerRepository:
    """The collection `newcomers`: a document an e-mail address, made by one workflow, with what was provided.

    Every change says for which workflow it is, and is made once however often it comes. All methods raise
    `pymongo.errors.PyMongoError` when MongoDB cannot serve.
    """

    def __init__(self, database: Any) -> None:
        self._newcomers = database["newcomers"]

    def create(self, email: str, name: str, *, workflow: str) -> bool:
        """Make the account; False if another workflow has made one for this address."""
        new = {"_id": email, "name": name, "workflow": workflow, "created_at": present(), "provided": {}, "log": []}
        try:
            self._newcomers.insert_one(new)
        except DuplicateKeyError:
            return self._newcomers.find_one({"_id": email, "workflow": workflow}) is not None
        return True

    def provide(self, email: str, what: str, number: str, *, workflow: str) -> str | None:
        """Give `what` under `number`, unless it was given before; answers its number, None without an account."""
        mine = {"_id": email, "workflow": workflow}
        change = {"$set": {f"provided.{what}": number}, "$push": {"log": what}}
        found: Document | None = self._newcomers.find_one_and_update(
            {**mine, f"provided.{what}": {"$exists": False}}, change, return_document=ReturnDocument.AFTER
        ) or self._newcomers.find_one(mine)
        return None if found is None else str(found["provided"][what])

    def take_back(self, email: str, what: str, *, workflow: str) -> bool:
        """Take `what` back if this workflow gave it; answers whether it had."""
        mine = {"_id": email, "workflow": workflow, f"provided.{what}": {"$exists": True}}
        outcome = self._newcomers.update_one(mine, {"$unset": {f"provided.{what}": ""}})
        return bool(outcome.modified_count)

    def remove(self, email: str, *, workflow: str) -> bool:
        """Remove the account if this workflow made it; answers whether it had."""
        outcome = self._newcomers.delete_one({"_id": email, "workflow": workflow})
        return bool(outcome.deleted_count)
