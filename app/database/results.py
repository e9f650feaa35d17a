"""The collection `task_results`: the archive of tasks that have ended."""

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import bson
from bson.errors import InvalidDocument
from pymongo import ASCENDING, IndexModel, MongoClient, UpdateOne

from app.database.documents import DUPLICATE_KEY, Document, present, refusals

INDEXES = [
    IndexModel([("task_id", ASCENDING)], unique=True),
    IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0),
]


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

    async def many(self, task_ids: Sequence[str]) -> dict[str, Document]:
        """The status documents of those of `task_ids` that are archived, by id."""
        rows = await self._results.find({"task_id": {"$in": list(task_ids)}}).to_list(len(task_ids))
        return {row["task_id"]: document for row in rows if (document := _status_document(row)) is not None}

    async def empty(self) -> bool:
        """Whether no task has ended yet."""
        return await self._results.find_one({}, {"_id": 1}) is None

    async def store(self, documents: Sequence[Document]) -> dict[int, str]:
        """Write status documents; one of a newer epoch or version that is there already stays.

        Answers the rows that MongoDB refused, by position, with the reason. Raises for anything that may pass.
        """
        rows = [self._row(document) for document in documents]
        failed = await refusals(self._results.insert_many(rows, ordered=False)) if rows else {}
        known = [index for index, error in failed.items() if error["code"] == DUPLICATE_KEY]
        refused = {index: error["errmsg"] for index, error in failed.items() if index not in known}
        if known:
            # A reopened task, or a batch that was read twice.
            writes = [_replacement_of_older(rows[index]) for index in known]
            failed = await refusals(self._results.bulk_write(writes, ordered=False))
            refused |= {known[position]: error["errmsg"] for position, error in failed.items()}
        return refused

    def _row(self, document: Document) -> Document:
        row = {
            "_id": f"{document['created_at']}-{document['task_id']}",
            **document,
            "result_json": None,  # the result, where BSON cannot say it
            "expires_at": present() + self._retention,
        }
        if not _fits_bson(row["result"]):
            row |= {"result": None, "result_json": json.dumps(row["result"])}
        return row


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
