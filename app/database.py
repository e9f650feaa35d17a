"""MongoDB: the client, the indexes, and one small repository a collection. No query lives anywhere else."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import bson
import structlog
from bson import ObjectId
from bson.errors import InvalidDocument
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import ASCENDING, DESCENDING, AsyncMongoClient, IndexModel, MongoClient, ReturnDocument, UpdateOne
from pymongo.errors import BulkWriteError, DuplicateKeyError

from app import problems
from app.settings import Settings

Document = dict[str, Any]

log = structlog.get_logger(__name__)

# MongoDB's error codes: there already; bad value, cannot parse, wrong type, bad field names, invalid, key or document
# too large.
DUPLICATE_KEY = 11000
SETTLED = frozenset({DUPLICATE_KEY, 2, 9, 14, 52, 57, 121, 10334, 17280})

# What no change of an item touches.
CONSTANT = ("_id", "identity", "digest", "created_at")
CHANGE_ATTEMPTS = 20
CHANGE_PAUSE = 0.005  # seconds, times the attempt, at most: who lost a race must not run the next one at once
BUSY = "The item changes faster than this request can be applied; try again."
# Nginx replays a request within its own time-outs, 40 s together; so many others may change the item meanwhile.
REPLAY_WINDOW = timedelta(minutes=2)
REPLAYS_MAX = 16

INDEXES = {
    "items": [
        IndexModel([("category", ASCENDING), ("_id", ASCENDING)]),
        IndexModel([("identity", ASCENDING)], unique=True),
        IndexModel([("deleted_at", ASCENDING), ("_id", ASCENDING)]),
        IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0),
    ],
    "dead_letters": [
        IndexModel([("key", ASCENDING)], unique=True),
        IndexModel([("state", ASCENDING), ("_id", ASCENDING)]),
        IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0),
    ],
    "task_results": [
        IndexModel([("task_id", ASCENDING)], unique=True),
        IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0),
    ],
}


def create_client(settings: Settings, *, name: str) -> Any:
    """A client with bounded pools and timeouts; PyMongo's or Motor's, whose calls are the same. Connects lazily."""
    kind = AsyncIOMotorClient if settings.mongodb_driver == "motor" else AsyncMongoClient
    milliseconds = int(settings.mongodb_timeout * 1000)
    return kind(
        settings.mongodb_url.get_secret_value(),
        appname=name,
        tz_aware=True,
        minPoolSize=settings.mongodb_pool_min,
        maxPoolSize=settings.mongodb_pool_max,
        timeoutMS=milliseconds,
        serverSelectionTimeoutMS=milliseconds,
        connectTimeoutMS=milliseconds,
    )


async def ensure_indexes(database: Any) -> None:
    """Create what `INDEXES` lists and is not there. Raises `pymongo.errors.PyMongoError`."""
    for collection, indexes in INDEXES.items():
        await database[collection].create_indexes(indexes)


class ItemRepository:
    """The collection `items`. All methods raise `pymongo.errors.PyMongoError` when MongoDB cannot serve.

    An item has a `version`, counted up by each change; the `identity` of the request that made it (unique), so that
    the same request seen twice makes one item; and the `edge`, the edge's name of the request that changed it last.
    `earlier` are the versions before that which a replay of their request may still ask for.

    A deleted item leaves a tombstone, which only `create` and replays see: with `deleted_at`, without content, for
    `identity_ttl` seconds.
    """

    def __init__(self, database: Any, *, identity_ttl: float) -> None:
        self._items = database["items"]
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
        """Insert an item; answers it and whether it is new.

        Where the same identity has made one before, the answer is that one as it was made: its `digest` says whether
        its content was `content`.
        """
        now = _now()
        item = {
            "_id": ObjectId(), **content, "version": 1, "identity": identity, "digest": digest,
            "created_at": now, "updated_at": now,
        }  # fmt: skip
        try:
            await self._items.insert_one(item)
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
            now = _now()
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
            now = _now()
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


class TaskResultRepository:
    """The collection `task_results`: final task records, for `retention_days`.

    `_id` is the creation time and the task id, so that pages by `_id` are in the order of creation.
    All methods raise `pymongo.errors.PyMongoError` when MongoDB cannot serve.
    """

    def __init__(self, database: Any, *, retention_days: int) -> None:
        self._results = database["task_results"]
        self._retention = timedelta(days=retention_days)

    async def get(self, task_id: str) -> Document | None:
        """The status document of an archived task, as `engine.record.document` made it, or None."""
        return _status_document(await self._results.find_one({"task_id": task_id}))

    async def known(self, task_ids: Sequence[str]) -> dict[str, Document]:
        """Digest, epoch and error of those of `task_ids` that are archived, by id."""
        fields = dict.fromkeys(("task_id", "digest", "epoch", "error"), 1)
        rows = await self._results.find({"task_id": {"$in": list(task_ids)}}, fields).to_list(len(task_ids))
        return {row["task_id"]: row for row in rows}

    async def empty(self) -> bool:
        """Whether no task has ended yet."""
        return await self._results.find_one({}, {"_id": 1}) is None

    async def store(self, documents: Sequence[Document]) -> dict[int, str]:
        """Write status documents; one of a newer epoch or version that is there already stays.

        Answers the rows that MongoDB refused, by position, with the reason. Raises for anything that may pass.
        """
        rows = [self._row(document) for document in documents]
        failed = await _failed(self._results.insert_many(rows, ordered=False)) if rows else {}
        known = [index for index, error in failed.items() if error["code"] == DUPLICATE_KEY]
        refused = {index: error["errmsg"] for index, error in failed.items() if index not in known}
        if known:
            # A reopened task, or a batch that was read twice.
            writes = [_replacement_of_older(rows[index]) for index in known]
            failed = await _failed(self._results.bulk_write(writes, ordered=False))
            refused |= {known[position]: error["errmsg"] for position, error in failed.items()}
        return refused

    def _row(self, document: Document) -> Document:
        row = {
            "_id": f"{document['created_at']}-{document['task_id']}",
            **document,
            "result_json": None,  # the result, where BSON cannot say it
            "expires_at": _now() + self._retention,
        }
        if not _fits_bson(row["result"]):
            row |= {"result": None, "result_json": json.dumps(row["result"])}
        return row


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
        change = {"$set": {"revoked_at": _now()}}
        revoked: Document | None = await self._keys.find_one_and_update(
            {"_id": key_id, "revoked_at": None}, change, return_document=ReturnDocument.AFTER
        )
        return revoked or await self.get(key_id)


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
        expires_at = _now() + self._retention
        rows = [
            {**letter, "state": "open", "settled_at": None, "settled_by": None, "expires_at": expires_at}
            for letter in letters
        ]
        failed = await _failed(self._letters.insert_many(rows, ordered=False))
        for index, error in failed.items():
            if error["code"] != DUPLICATE_KEY:
                log.error("a dead letter cannot be kept", key=letters[index]["key"], reason=error["errmsg"])

    async def page(
        self, *, limit: int, before: ObjectId | None, state: str | None, name: str | None, queue: str | None
    ) -> list[Document]:
        """At most `limit` letters, the latest first, those before the id `before`."""
        query = _given(state=state, name=name, queue=queue)
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
        count: int = await self._letters.count_documents(_given(state="open", name=name, queue=queue))
        return count

    async def settle(self, letter_id: ObjectId, state: Literal["replayed", "discarded"], *, by: str) -> bool:
        """Note what was done with an open letter, and by whom; False if it is open no longer.

        Of one that was discarded while its replay left, the replay counts: the task runs.
        """
        change = {"$set": {"state": state, "settled_at": _now(), "settled_by": by}}
        before = {"$ne": "replayed"} if state == "replayed" else "open"
        outcome = await self._letters.update_one({"_id": letter_id, "state": before}, change)
        return bool(outcome.modified_count)


class ResultReader:
    """The collection `task_results` as workers read it, without an event loop. Connects at the first call.

    Raises `pymongo.errors.PyMongoError` when MongoDB cannot serve.
    """

    def __init__(self, url: str, database: str, *, timeout: float) -> None:
        milliseconds = int(timeout * 1000)
        self._client: MongoClient[Document] = MongoClient(
            url,
            appname="worker",
            tz_aware=True,
            maxPoolSize=1,
            connect=False,
            timeoutMS=milliseconds,
            serverSelectionTimeoutMS=milliseconds,
            connectTimeoutMS=milliseconds,
        )
        self._results = self._client[database]["task_results"]

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def get(self, task_id: str) -> Document | None:
        """The status document of an archived task, or None."""
        return _status_document(self._results.find_one({"task_id": task_id}))


def _status_document(row: Document | None) -> Document | None:
    if row is None:
        return None
    if row["result_json"] is not None:
        row["result"] = json.loads(row["result_json"])
    return {key: value for key, value in row.items() if key not in _ARCHIVE_FIELDS}


def _given(**fields: str | None) -> Document:
    return {name: value for name, value in fields.items() if value is not None}


async def _failed(write: Awaitable[Any]) -> dict[int, Document]:
    """Await an unordered bulk write; answers the errors of its rows by position."""
    try:
        await write
    except BulkWriteError as error:
        rows = {row["index"]: row for row in error.details["writeErrors"]}
        # What is neither there already nor impossible may pass: the batch is written again.
        if error.details["writeConcernErrors"] or any(row["code"] not in SETTLED for row in rows.values()):
            raise
        return rows
    return {}


def _replacement_of_older(row: Document) -> UpdateOne:
    epoch, version = row["epoch"], row["version"]
    older = {"$or": [{"epoch": {"$lt": epoch}}, {"epoch": epoch, "version": {"$lt": version}}]}
    content = {name: value for name, value in row.items() if name != "_id"}
    return UpdateOne({"task_id": row["task_id"], **older}, {"$set": content})


_ARCHIVE_FIELDS = {"_id", "expires_at", "result_json"}


def _fits_bson(value: Mapping[str, Any] | Any) -> bool:
    # Integers past 64 bits, lone surrogates and NUL in a key are JSON, but not BSON.
    try:
        bson.encode({"value": value})
    except (InvalidDocument, OverflowError, UnicodeEncodeError):
        return False
    return True


def _now() -> datetime:
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)  # BSON keeps milliseconds
