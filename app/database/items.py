"""The collection `items`."""

import asyncio
import random
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

from bson import ObjectId
from pymongo import ASCENDING, IndexModel, ReturnDocument
from pymongo.errors import DuplicateKeyError

from app import problems
from app.contracts import EventName, ItemCreated
from app.database import outbox
from app.database.documents import Document, present
from app.database.transactions import in_transaction

INDEXES = [
    IndexModel([("category", ASCENDING), ("_id", ASCENDING)]),
    IndexModel([("identity", ASCENDING)], unique=True),
    IndexModel([("deleted_at", ASCENDING), ("_id", ASCENDING)]),
    IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0),
]

# What no change of an item touches.
CONSTANT = ("_id", "identity", "digest", "created_at")
CHANGE_ATTEMPTS = 20
CHANGE_PAUSE = 0.005  # seconds, times the attempt, at most: who lost a race must not run the next one at once
SOURCE = "/items"  # of the events that tell of items
BUSY = "The item changes faster than this request can be applied; try again."
# Nginx replays a request within its own time-outs, 40 s together; so many others may change the item meanwhile.
REPLAY_WINDOW = timedelta(minutes=2)
REPLAYS_MAX = 16


class ItemRepository:
    """The collection `items`. All methods raise `pymongo.errors.PyMongoError` when MongoDB cannot serve.

    An item has a `version`, counted up by each change; the `identity` of the request that made it (unique), so that
    the same request seen twice makes one item; and the `edge`, the edge's name of the request that changed it last.
    `earlier` are the versions before that which a replay of their request may still ask for.

    A deleted item leaves a tombstone, which only `create` and replays see: with `deleted_at`, without content, for
    `identity_ttl` seconds. `timeout`, in seconds, bounds a create with all that belongs to it.
    """

    def __init__(self, database: Any, *, identity_ttl: float, timeout: float) -> None:
        self._database = database
        self._timeout = timeout
        self._items = database["items"]
        self._outbox = database["outbox"]
        self._identity_ttl = timedelta(seconds=identity_ttl)

    async def page(self, *, limit: int, after: ObjectId | None, category: str | None) -> list[Document]:
        """At most `limit` items in the order they were made, those after the id `after`."""
        query: Document = {"deleted_at": {"$exists": False}}
        if after is not None:
            query["_id"] = {"$gt": after}
        if category is not None:
            query["category"] = category
        found = self._items.find(query, {"earlier": 0}).sort("_id", ASCENDING).limit(limit)
        rows: list[Document] = await found.to_list(limit)
        return rows

    async def get(self, item_id: ObjectId) -> Document | None:
        """The item, or None."""
        item: Document | None = await self._items.find_one({"_id": item_id})
        return None if item is None or "deleted_at" in item else item

    async def create(self, content: Document, *, identity: str, digest: str) -> tuple[Document, bool]:
        """Insert an item together with the event `item.created`; answers it and whether it is new.

        Where the same identity has made one before, the answer is that one as it was made: its `digest` says whether
        its content was `content`.
        """
        now = present()
        item = {
            "_id": ObjectId(), **content, "version": 1, "identity": identity, "digest": digest,
            "created_at": now, "updated_at": now,
        }  # fmt: skip
        told = ItemCreated(item_id=str(item["_id"]), name=content["name"], category=content["category"])
        event = outbox.row(EventName.ITEM_CREATED, told, source=SOURCE)

        async def insert(session: Any) -> None:
            # The item last: until the commit its identity is taken, for who dies in between and for the repeat as well.
            await self._outbox.insert_one(event, session=session)
            await self._items.insert_one(item, session=session)

        try:
            await in_transaction(self._database, insert, seconds=self._timeout)
        except DuplicateKeyError:
            earlier: Document | None = await self._items.find_one({"identity": identity})
            if earlier is None:
                raise
            made = {name: earlier[name] for name in ("_id", "identity", "digest", "created_at")}
            return {**made, **content, "version": 1, "updated_at": made["created_at"]}, False
        return item, True

    async def change(
        self, item_id: ObjectId, content: Callable[[Document], Document], *, versions: Sequence[int] | None, edge: str
    ) -> Document | None:
        """Give an item the `content` that is made of the present one; answers the new item, None where there is none.

        `edge` names the request at the edge: what it has changed already is answered again, as it was then. Raises
        `PreconditionFailed` unless the item is at one of `versions` (any, where None), and `Conflict` (problems).
        """
        for attempt in range(CHANGE_ATTEMPTS):
            item = await self._items.find_one({"_id": item_id})
            if item is None:
                return None
            if (left := _left_by(edge, item)) is not None:
                return left
            if "deleted_at" in item:
                return None
            now = present()
            change = {**content(_expected(item, versions)), "edge": edge, "updated_at": now}
            changed: Document | None = await self._items.find_one_and_update(
                {"_id": item_id, "version": item["version"]},
                {"$set": {**change, "earlier": _earlier(item, now)}, "$inc": {"version": 1}},
                return_document=ReturnDocument.AFTER,
            )
            if changed is not None:
                return changed
            await asyncio.sleep(random.uniform(0, CHANGE_PAUSE * attempt))  # noqa: S311  not for secrets
        raise problems.Conflict(BUSY, retry_after=1)

    async def delete(self, item_id: ObjectId, *, versions: Sequence[int] | None, edge: str) -> bool:
        """Put a tombstone in an item's place; False where there is none, unless the request `edge` has deleted it.

        Raises as `change` does.
        """
        for attempt in range(CHANGE_ATTEMPTS):
            item = await self._items.find_one({"_id": item_id})
            if item is None or "deleted_at" in item:
                return item is not None and item["edge"] == edge
            now = present()
            tombstone = {
                **{name: value for name, value in _expected(item, versions).items() if name in CONSTANT},
                "version": item["version"] + 1,
                "edge": edge,
                "deleted_at": now,
                "expires_at": now + self._identity_ttl,
                "earlier": _earlier(item, now),
            }
            outcome = await self._items.replace_one({"_id": item_id, "version": item["version"]}, tombstone)
            if outcome.matched_count:
                return True
            await asyncio.sleep(random.uniform(0, CHANGE_PAUSE * attempt))  # noqa: S311  not for secrets
        raise problems.Conflict(BUSY, retry_after=1)


def _expected(item: Document, versions: Sequence[int] | None) -> Document:
    if versions is not None and item["version"] not in versions:
        raise problems.PreconditionFailed
    return item


def _left_by(edge: str, item: Document) -> Document | None:
    """The item as the change by the request `edge` left it, None where it has changed nothing."""
    if item.get("edge") == edge and "deleted_at" not in item:
        return item
    fixed = {name: item[name] for name in CONSTANT if name in item}
    return next(({**fixed, **version} for version in item.get("earlier", []) if version["edge"] == edge), None)


def _earlier(item: Document, now: datetime) -> list[Document]:
    """What a change at `now` has to keep of the versions so far, the present one included."""
    present = {name: value for name, value in item.items() if name not in {*CONSTANT, "earlier"}}
    versions = [*item.get("earlier", []), *([present] if "edge" in present else [])]
    return [version for version in versions if version["updated_at"] > now - REPLAY_WINDOW][-REPLAYS_MAX:]
