"""What all repositories share: documents, times, and which writes MongoDB refused."""

from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import Any

from pymongo.errors import BulkWriteError

Document = dict[str, Any]

# MongoDB's error codes: there already; bad value, cannot parse, wrong type, bad field names, invalid, key or document
# too large.
DUPLICATE_KEY = 11000
SETTLED = frozenset({DUPLICATE_KEY, 2, 9, 14, 52, 57, 121, 10334, 17280})


def present() -> datetime:
    """The present time, as BSON keeps it: in milliseconds."""
    moment = datetime.now(UTC)
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def given(**fields: str | None) -> Document:
    """A query for the fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


async def refusals(write: Awaitable[Any]) -> dict[int, Document]:
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
