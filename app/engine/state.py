"""Task records in Redis: their keys, the scripts that alone write them, and how they read.

A record is one hash, `task:{id}`. Every transition is a Lua script (app/engine/lua), so that it happens whole or not
at all, whoever races. Pure functions here build each script's keys and arguments; two thin classes run them, one
awaiting (API, beat), one blocking (Celery's prefork children).
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from importlib.resources import files
from typing import Any, Literal, NamedTuple
from uuid import uuid4

import orjson
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from app.contracts import nested_deeper

RESULT_MAX_DEPTH = 64  # levels; MongoDB takes no more than 100 a document

FINISHED = "tasks:finished"  # stream of ids whose final record the archive has not written yet
REFUSED = "tasks:refused"  # stream of ids that MongoDB refused to take, with the reason
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


def _keys(task_id: str, queue: str) -> list[str]:
    # What a transition may touch: the record, its place in the queue, the archive's stream.
    return [record_key(task_id), waiting_key(queue), FINISHED]


def _script(name: str, *, allow_oom: bool = True) -> str:
    # Only what adds a task may fail when Redis is full: ending one is what makes room.
    folder = files("app.engine").joinpath("lua")
    shebang = "#!lua flags=allow-oom\n" if allow_oom else ""
    return shebang + folder.joinpath("prelude.lua").read_text() + folder.joinpath(f"{name}.lua").read_text()


SCRIPTS = {
    "create": _script("create", allow_oom=False),
    **{
        name: _script(name)
        for name in (
            "confirm", "withdraw", "start", "recreate", "progress", "retry", "finish", "cancel", "archived",
        )
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Message:
    """A task as it travels: what the record is made of, and what every message repeats so that it can be made again.

    `owner` is the API key that made it, "" where none did; `publish` names one publish; `created_at` is in milliseconds
    since the epoch, 0 before the record is written; `run` counts the starts of the record up to this one, 0 before it
    has started.
    """

    task_id: str
    name: str
    queue: str
    payload: Mapping[str, Any]
    digest: str
    request_id: str
    owner: str = ""
    epoch: int = 1
    retries: int = 0
    publish: str = ""
    created_at: int = 0
    run: int = 0

    def fields(self) -> list[str | bytes]:
        """The record's unchanging fields and values, in a row."""
        payload = orjson.dumps(self.payload)
        return [
            "name", self.name, "queue", self.queue, "payload", payload, "request_id", self.request_id,
            "owner", self.owner,
        ]  # fmt: skip


class Created(NamedTuple):
    """What `create` found: an outcome, and what belongs to it."""

    outcome: Literal["created", "leased", "exists", "conflict", "full", "backlog"]
    epoch: int = 0
    created_at: int = 0
    lease_left: float = 0  # seconds


class Started(NamedTuple):
    """What a worker is to do with a message."""

    outcome: Literal["run", "missing", "stale", "duplicate", "stored", "dead", "republish"]
    result: Any = None
    error: Mapping[str, Any] | None = None
    retries: int = 0
    due_in: float = 0  # seconds
    run: int = 0


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


def new_publish() -> str:
    """A name for one publish of one message."""
    return uuid4().hex


def _time(milliseconds: str | None) -> str | None:
    if milliseconds is None:
        return None
    moment = datetime.fromtimestamp(int(milliseconds) / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _progress(record: Mapping[str, str]) -> dict[str, float] | None:
    if "total" not in record:
        return None
    current, total = int(record["current"]), int(record["total"])
    return {"current": current, "total": total, "progress": round(100 * current / total, 1) if total else 100.0}


def document(task_id: str, record: Mapping[str, str]) -> dict[str, Any]:
    """The status document of a record: what the archive keeps and live updates tell.

    Clients see the fields of `models.TaskStatus`; the last four are for us.
    """
    return {
        "task_id": task_id,
        "name": record["name"],
        "status": record["status"],
        "progress": _progress(record),
        "result": json.loads(record["result"]) if "result" in record else None,
        "error": orjson.loads(record["error"]) if "error" in record else None,
        "attempts": int(record["attempts"]),
        "queue": record["queue"],
        "request_id": record["request_id"],
        "created_at": _time(record["created_at"]),
        "started_at": _time(record.get("started_at")),
        "finished_at": _time(record.get("finished_at")),
        "owner": record["owner"],
        "digest": record["digest"],
        "epoch": int(record["epoch"]),
        "version": int(record["version"]),
    }


class AsyncTaskStore:
    """Records as API and beat use them. Every method raises `redis.exceptions.RedisError` when Redis cannot serve."""

    def __init__(self, redis: AsyncRedis, *, queue_max: int, backlog_max: int, result_ttl: int) -> None:
        self.redis = redis
        self._queue_max = queue_max
        self._backlog_max = backlog_max
        self._result_ttl = result_ttl
        self._scripts = {name: redis.register_script(text) for name, text in SCRIPTS.items()}

    async def create(self, message: Message, *, lease: float) -> Created:
        """Write `message`'s record, PENDING, under a lease of `lease` seconds, unless its identity has one already."""
        keys = _keys(message.task_id, message.queue)
        arguments: list[Any] = [message.task_id, message.digest, int(lease * 1000), message.publish]
        answer = await self._scripts["create"](
            keys=keys, args=[*arguments, self._queue_max, self._backlog_max, *message.fields()]
        )
        match answer:
            case ["created", epoch, created_at]:
                return Created("created", epoch=int(epoch), created_at=int(created_at))
            case ["leased", left]:
                return Created("leased", lease_left=left / 1000)
            case [outcome, *_]:
                return Created(outcome)
        raise TypeError(answer)

    async def confirm(self, message: Message) -> None:
        """End the lease of a message that the broker confirmed."""
        keys = [record_key(message.task_id), waiting_key(message.queue)]
        await self._scripts["confirm"](keys=keys, args=[message.task_id, message.publish])

    async def withdraw(self, message: Message, *, certain: bool, error: Mapping[str, str]) -> Status | None:
        """Take back a record whose message was not confirmed; `certain` if the broker refused it.

        Returns None if that was done, else the status that the record has by another hand.
        """
        status = await self._scripts["withdraw"](
            keys=_keys(message.task_id, message.queue),
            args=[message.task_id, message.publish, int(certain), orjson.dumps(error)],
        )
        return Status(status) if status else None

    async def cancel(self, task_id: str, queue: str) -> str | None:
        """Ask for a task's end: CANCELLED, CANCELLING, another final status, or None for an unknown id."""
        error = error_document("cancelled", "Cancelled before it ran.")
        keys = _keys(task_id, queue)
        status: str | None = await self._scripts["cancel"](keys=keys, args=[task_id, orjson.dumps(error)])
        return status

    async def record(self, task_id: str) -> dict[str, str]:
        """The record's fields; empty for an unknown id."""
        record: Any = await self.redis.hgetall(record_key(task_id))
        return dict(record)

    async def records(self, task_ids: list[str]) -> list[dict[str, str]]:
        """The records of many ids in one round trip."""
        async with self.redis.pipeline(transaction=False) as pipe:
            for task_id in task_ids:
                pipe.hgetall(record_key(task_id))
            rows: list[dict[str, str]] = await pipe.execute()
            return rows

    async def archived(self, group: str, rows: list[tuple[str, str, str]]) -> None:
        """Let records expire that MongoDB has: rows of (stream entry, task id, version as archived)."""
        async with self.redis.pipeline(transaction=False) as pipe:
            for entry, task_id, version in rows:
                await self._scripts["archived"](
                    keys=[record_key(task_id), FINISHED], args=[group, entry, version, self._result_ttl], client=pipe
                )
            await pipe.execute()


class TaskStore:
    """Records as a worker uses them. Every method raises `redis.exceptions.RedisError` when Redis cannot serve."""

    def __init__(self, redis: Redis, *, celery_result_ttl: int) -> None:
        self._redis = redis
        self._celery_result_ttl = celery_result_ttl
        self._scripts = {name: redis.register_script(text) for name, text in SCRIPTS.items()}

    def start(self, message: Message, worker: str) -> Started:
        """Decide whether a message's task runs; makes its record again if Redis has lost it."""
        keys = _keys(message.task_id, message.queue)
        cancelled = orjson.dumps(error_document("cancelled", "Cancelled while it ran."))
        arguments = [message.task_id, message.epoch, message.retries, message.publish, worker, cancelled]
        answer = self._run(message, "start", keys, arguments)
        match answer:
            case ["run", run]:
                return Started("run", run=int(run))
            case ["stored", result]:
                return Started("stored", result=json.loads(result))
            case ["dead", _, error]:
                return Started(
                    "dead", error=orjson.loads(error) if error else error_document("cancelled", "Cancelled.")
                )
            case ["republish", retries, due_in]:
                return Started("republish", retries=int(retries), due_in=due_in / 1000)
            case [outcome, *_]:
                return Started(outcome)
        raise TypeError(answer)

    def progress(self, message: Message, current: int, total: int) -> Literal["go", "cancel", "lost"]:
        """Write how far a run has come; answers whether it is to go on."""
        keys = [record_key(message.task_id)]
        answer: Literal["go", "cancel", "lost", "missing"] = self._scripts["progress"](
            keys=keys, args=[*_run(message), current, total]
        )
        # A lost record is made again by the end of the run; to stop now would help nobody.
        return "go" if answer == "missing" else answer

    def retry(self, message: Message, due_in: float, error: Mapping[str, str]) -> Literal["RETRY", "CANCELLED", "lost"]:
        """Write RETRY for the next attempt, due in `due_in` seconds; `message` is the attempt that failed."""
        keys = _keys(message.task_id, message.queue)
        arguments = [message.task_id, *_run(message), int(due_in * 1000), orjson.dumps(error)]
        answer: Literal["RETRY", "CANCELLED", "lost"] = self._run(message, "retry", keys, arguments)
        return answer

    def finish(self, message: Message, status: Status, value: bytes, celery_result: str | bytes) -> str:
        """Write a run's final state and Celery's result; answers the status, or "lost" where it had no effect."""
        keys = [*_keys(message.task_id, message.queue), CELERY_RESULT + message.task_id]
        field = "result" if status is Status.SUCCESS else "error"
        arguments = [message.task_id, *_run(message), status, field, value, celery_result, self._celery_result_ttl]
        answer: str = self._run(message, "finish", keys, arguments)
        return answer

    def fail(self, task_id: str, error: Mapping[str, str]) -> None:
        """End a waiting task of which no more than the id is at hand; without effect where it does not wait."""
        record: Any = self._redis.hgetall(record_key(task_id))
        if not record:
            return
        message = Message(
            task_id=task_id,
            name=record["name"],
            queue=record["queue"],
            payload=orjson.loads(record["payload"]),
            digest=record["digest"],
            request_id=record["request_id"],
            owner=record["owner"],
            epoch=int(record["epoch"]),
            retries=int(record["retries"]),
            publish=new_publish(),
            created_at=int(record["created_at"]),
        )
        started = self.start(message, worker="")
        if started.outcome == "run":
            self.finish(replace(message, run=started.run), Status.FAILURE, encode_result(error), "{}")

    def _run(self, message: Message, name: str, keys: list[str], arguments: list[Any]) -> Any:
        answer = self._scripts[name](keys=keys, args=arguments)
        if answer in ("missing", ["missing"]):
            self._recreate(message, running=name != "start")
            answer = self._scripts[name](keys=keys, args=arguments)
        return answer

    def _recreate(self, message: Message, *, running: bool) -> None:
        fields: list[Any] = [*message.fields(), "epoch", message.epoch, "retries", message.retries]
        fields += ["digest", message.digest, "created_at", message.created_at or int(time.time() * 1000)]
        if running:
            fields += ["status", Status.STARTED, "publish", message.publish, "attempts", message.run]
        self._scripts["recreate"](keys=[record_key(message.task_id)], args=fields)


def _run(message: Message) -> list[int | str]:
    return [message.epoch, message.retries, message.publish, message.run]
