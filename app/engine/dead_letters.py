"""Dead letters: what failed for good, kept in MongoDB until somebody replays or discards it.

Two ways lead here. A task that ends as FAILURE gets its letter from the archive loop, whatever ended it. Messages that
RabbitMQ dead-letters come by the queue `dead`: those of failed tasks once more, those that killed their workers too
often (`poison`), and those that are no tasks at all (`bad_envelope`).
"""

import asyncio
import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson
import structlog
from aio_pika.abc import AbstractIncomingMessage
from aio_pika.exceptions import CONNECTION_EXCEPTIONS
from pymongo.errors import PyMongoError
from redis.exceptions import RedisError

from app.database import DeadLetterRepository, TaskResultRepository
from app.engine.loops import forever
from app.engine.message import Message, of_headers
from app.engine.publisher import Publisher, Refused
from app.engine.queues import DEAD
from app.engine.record import Status, error_document
from app.engine.state import AsyncTaskStore

log = structlog.get_logger(__name__)

BATCH = 100
POLL = 1.0  # seconds between looks into an empty queue
BODY_MAX = 65_536  # bytes that are kept of a message that is no task
HEADERS_MAX = 16_384  # of its headers, as JSON

POISON = "poison"
BAD_ENVELOPE = "bad_envelope"
TOO_OFTEN = "delivery_limit"  # RabbitMQ's reason


def is_dead(record: Mapping[str, str]) -> bool:
    """Whether a record is of a task that was taken in and failed for good, and no more was tried since.

    Not one that was never published, or whose replay was not.
    """
    return record.get("status") == Status.FAILURE and not {"unpublished", "unreplayed"} & record.keys()


def letter(task_id: str, record: Mapping[str, str]) -> dict[str, Any]:
    """The dead letter of a record that ended as FAILURE."""
    return {
        "key": f"{task_id}:{record['epoch']}",
        "task_id": task_id,
        "name": record["name"],
        "queue": record["queue"],
        "reason": record.get("reason", "permanent"),
        "error": orjson.loads(record["error"]),
        "attempts": int(record["attempts"]),
        "request_id": record["request_id"],
        "owner": record["owner"],
        "workflow": record.get("workflow", ""),
        "epoch": int(record["epoch"]),
        "message": {
            "payload": record["payload"],  # as text: BSON cannot say all that JSON can
            "digest": record["digest"],
            "created_at": int(record["created_at"]),
        },
        "died_at": datetime.fromtimestamp(int(record["finished_at"]) / 1000, UTC),
    }


def message_of_letter(letter: Mapping[str, Any]) -> Message:
    """The message that a replay publishes; its epoch is still the one that failed."""
    kept = letter["message"]
    return Message.new(
        task_id=letter["task_id"],
        name=letter["name"],
        queue=letter["queue"],
        payload=orjson.loads(kept["payload"]),
        digest=kept["digest"],
        request_id=letter["request_id"],
        owner=letter["owner"],
        epoch=letter["epoch"],
        created_at=kept["created_at"],
        workflow=letter.get("workflow", ""),
    )


def letter_of_stranger(body: bytes, headers: Mapping[str, Any], fault: str) -> dict[str, Any]:
    """The dead letter of a message that is no task of ours: all that is known is what it carries."""
    shown = orjson.dumps(headers, default=str, option=orjson.OPT_NON_STR_KEYS)
    death = Death.of(headers)
    return {
        "key": hashlib.sha256(shown + body).hexdigest(),
        "task_id": None,
        "name": None,
        "queue": death.queue,
        "reason": BAD_ENVELOPE,
        "error": error_document(BAD_ENVELOPE, fault),
        "attempts": 0,
        "request_id": None,
        "owner": "",
        "epoch": 0,
        "message": {
            "headers": shown[:HEADERS_MAX].decode(errors="replace"),
            "body_base64": base64.b64encode(body[:BODY_MAX]).decode(),
            "bytes": len(body),
        },
        "died_at": datetime.now(UTC),
    }


@dataclass(frozen=True, slots=True)
class Death:
    """Why and where RabbitMQ dead-lettered a message last."""

    reason: str
    queue: str

    @classmethod
    def of(cls, headers: Mapping[str, Any]) -> "Death":
        """What the header `x-death` says, whose first entry is the latest."""
        match headers.get("x-death"):
            case [{"reason": reason, "queue": queue}, *_]:
                return cls(str(reason), str(queue))
        return cls("", "")


class DeadLetters:
    """Drains the queue `dead`. Not a Celery worker: what is in there has killed some."""

    def __init__(
        self,
        store: AsyncTaskStore,
        results: TaskResultRepository,
        letters: DeadLetterRepository,
        publisher: Publisher,
        *,
        delivery_limit: int,
    ) -> None:
        self._store = store
        self._results = results
        self._letters = letters
        self._publisher = publisher
        self._delivery_limit = delivery_limit

    async def run(self) -> None:
        """Drain until cancelled; servers that are away are waited for, and what was not settled returns."""
        errors = (Refused, RedisError, PyMongoError, TimeoutError, OSError, *CONNECTION_EXCEPTIONS)
        await forever(self._drain, "dead letters", errors)

    async def _drain(self) -> None:
        async with self._publisher.channel() as channel:
            queue = await channel.get_queue(DEAD.name, ensure=False)
            while True:
                messages: list[AbstractIncomingMessage] = []
                while len(messages) < BATCH and (message := await queue.get(fail=False, timeout=POLL * 5)):
                    messages.append(message)
                for message in messages:
                    # The letter is in MongoDB and the state in Redis before the broker forgets.
                    await self.settle(message.body, message.headers)
                    await message.ack()
                if not messages:
                    await asyncio.sleep(POLL)

    async def settle(self, body: bytes, headers: Mapping[str, Any]) -> None:
        """Keep what a dead message tells, and end its task. Raises `RedisError` or `PyMongoError`."""
        try:
            message = of_headers(headers, body)
        except ValueError as error:
            log.warning("a message that is no task was dead-lettered", fault=str(error))
            await self._letters.add([letter_of_stranger(body, headers, str(error))])
            return
        death = Death.of(headers)
        outcome = await self._bury(message, death)
        if outcome == "missing":
            # Redis has lost its record, or it has expired: then the archive, which wrote its letter, knows its end.
            ended = await self._results.get(message.task_id)
            if ended is None or ended["epoch"] < message.epoch:
                await self._store.recreate(message)
                outcome = await self._bury(message, death)
        if outcome == "FAILURE":
            record = await self._store.record(message.task_id)
            if is_dead(record):
                await self._letters.add([letter(message.task_id, record)])
        log.warning(
            "dead letter", task_id=message.task_id, task=message.name, reason=death.reason, queue=death.queue,
            outcome=outcome, request_id=message.request_id,
        )  # fmt: skip

    async def _bury(self, message: Message, death: Death) -> str:
        return await self._store.bury(
            message,
            too_often=death.reason == TOO_OFTEN,
            starts=self._delivery_limit,
            error=_error_of(death),
            reason=POISON if death.reason == TOO_OFTEN else "permanent",
        )


def _error_of(death: Death) -> dict[str, str]:
    if death.reason == TOO_OFTEN:
        return error_document(POISON, "Each worker that ran this task died of it; it was given up.")
    return error_document("dead_lettered", f"RabbitMQ dead-lettered the message: {death.reason or 'no reason given'}.")
