"""A task's record as it reads: its keys in Redis, its states, and the document that clients and the archive see."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import orjson

from app.contracts import nested_deeper

RESULT_MAX_DEPTH = 64  # levels; MongoDB takes no more than 100 a document

FINISHED = "tasks:finished"  # stream of ids whose final record the archive has not written yet
REFUSED = "tasks:refused"  # stream of ids that MongoDB refused to take, with the reason
KEPT = "tasks:kept"  # there as long as Redis keeps what it is given: where it is not, records got lost
RECOVERING = "tasks:recovering"  # there while tasks may wait whose records are not made again yet
RECOVERING_MAX = 86_400  # seconds
GLANCE = ["status", "queue", "lease", "lost", "looks"]
OPEN = "tasks:open"  # ids that have not ended, by when the reconciler is to look at them
CELERY_RESULT = "celery-task-meta-"  # Celery's own key for a result


class Status(StrEnum):
    """The states of a task. PENDING → STARTED → PROGRESS* → SUCCESS | FAILURE | CANCELLED, RETRY between attempts."""

    PENDING = "PENDING"
    STARTED = "STARTED"
    PROGRESS = "PROGRESS"
    RETRY = "RETRY"
    SUCCESS = "SUCCESS"
    FAILURE = "FAILURE"
    CANCELLED = "CANCELLED"


FINAL = frozenset({Status.SUCCESS, Status.FAILURE, Status.CANCELLED})


def record_key(task_id: str) -> str:
    """The key of a task's record, also the channel on which its changes are announced."""
    return f"task:{task_id}"


def waiting_key(queue: str) -> str:
    """The key of the ids that wait in `queue`: how many is the queue's depth, without asking the broker."""
    return f"queue:{queue}:waiting"


def drain_key(queue: str) -> str:
    """The key of the counts of tasks that have left `queue` lately."""
    return f"queue:{queue}:drain"


def error_document(kind: str, message: str) -> dict[str, str]:
    """An error as records and answers carry it; the message is cut at 1,000 characters."""
    return {"type": kind, "message": message[:1000].encode("utf-8", "replace").decode()}


def encode_result(result: Any) -> bytes:
    """A task's result as JSON (RFC 8259). Raises `TypeError` or `ValueError` for what it cannot be.

    That is what JSON in UTF-8 cannot say, and more than `RESULT_MAX_DEPTH` levels.

    Not by orjson, which knows no integers past 64 bits.
    """
    if nested_deeper(result, RESULT_MAX_DEPTH):
        raise ValueError(f"it is nested deeper than {RESULT_MAX_DEPTH} levels")
    return json.dumps(result, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def moment(milliseconds: str | None) -> str | None:
    """A record's time as answers have it: ISO 8601, UTC, in milliseconds."""
    if milliseconds is None:
        return None
    time = datetime.fromtimestamp(int(milliseconds) / 1000, UTC)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def progress_of(record: Mapping[str, str]) -> dict[str, float] | None:
    """How far a record's task has come, in percent too; None where it has not said so."""
    if "total" not in record:
        return None
    current, total = int(record["current"]), int(record["total"])
    return {"current": current, "total": total, "progress": round(100 * current / total, 1) if total else 100.0}


def document(task_id: str, record: Mapping[str, str]) -> dict[str, Any]:
    """The status document of a record: what the archive keeps and live updates tell.

    Clients see the fields of `models.TaskStatus`; the last four are for us. Records and archived
    documents of an older version have no `workflow`.
    """
    return {
        "task_id": task_id,
        "name": record["name"],
        "status": record["status"],
        "progress": progress_of(record),
        "result": json.loads(record["result"]) if "result" in record else None,
        "error": orjson.loads(record["error"]) if "error" in record else None,
        "attempts": int(record["attempts"]),
        "queue": record["queue"],
        "request_id": record["request_id"],
        "workflow": record.get("workflow", ""),
        "created_at": moment(record["created_at"]),
        "started_at": moment(record.get("started_at")),
        "finished_at": moment(record.get("finished_at")),
        "owner": record["owner"],
        "digest": record["digest"],
        "epoch": int(record["epoch"]),
        "version": int(record["version"]),
    }
