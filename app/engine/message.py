"""A task as it travels, and what its message carries so that its record can be made again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self
from uuid import uuid4

import orjson

# The header under which a message carries what its record is made of.
RECORD = "record"


@dataclass(frozen=True, slots=True)
class Message:
    """A task as it travels: what the record is made of, and what every message repeats so that it can be made again.

    `owner` is the API key that made it, "" where none did; `publish` names one publish; `created_at` is in milliseconds
    since the epoch, 0 before the record is written; `run` counts the starts of the record up to this one, 0 before it
    has started; `workflow` is the one that it is a member of, "" if of none.
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
    workflow: str = ""

    def fields(self) -> list[str | bytes]:
        """The record's unchanging fields and values, in a row."""
        payload = orjson.dumps(self.payload)
        return [
            "name", self.name, "queue", self.queue, "payload", payload, "request_id", self.request_id,
            "owner", self.owner, "workflow", self.workflow,
        ]  # fmt: skip

    @classmethod
    def new(cls, **fields: Any) -> Self:
        """A message of `fields` under a publish of its own."""
        return cls(publish=new_publish(), **fields)

    @classmethod
    def of_record(cls, task_id: str, record: Mapping[str, str]) -> Self:
        """The message that a record's next attempt needs, under a publish of its own."""
        return cls.new(
            task_id=task_id,
            name=record["name"],
            queue=record["queue"],
            payload=orjson.loads(record["payload"]),
            digest=record["digest"],
            request_id=record["request_id"],
            owner=record["owner"],
            epoch=int(record["epoch"]),
            retries=int(record["retries"]),
            created_at=int(record["created_at"]),
            workflow=record.get("workflow", ""),
        )


def new_publish() -> str:
    """A name for one publish of one message."""
    return uuid4().hex


def record_header(message: Message) -> dict[str, Any]:
    """What a message repeats of its record, so that a worker can tell runs apart and make a lost record again."""
    return {
        "epoch": message.epoch,
        "publish": message.publish,
        "queue": message.queue,
        "digest": message.digest,
        "request_id": message.request_id,
        "owner": message.owner,
        "created_at": message.created_at,
        "workflow": message.workflow,
    }


def has_record(request: Any) -> bool:
    """Whether a message came from our publisher; those of Celery's own canvas have no record."""
    # What Celery hands over for a task that it does not know has no headers at all.
    return RECORD in (getattr(request, "headers", None) or {})


def message_of(request: Any, task_name: str) -> Message:
    """The message by which a Celery request with a record came; once the task has started, with its run."""
    started: Message | None = getattr(request, "started", None)
    if started is not None:
        return started
    return _message(request.headers[RECORD], request.id, task_name, request.kwargs["payload"], request.retries or 0)


def of_headers(headers: Mapping[str, Any], body: bytes) -> Message:
    """The message that AMQP headers and a body are. Raises `ValueError`, with the fault, for one that is no task."""
    fault = header_fault(headers) or body_fault(body)
    if fault is not None:
        raise ValueError(fault)
    if RECORD not in headers:
        raise ValueError("it has no record")
    try:
        payload = orjson.loads(body)[1]["payload"]
        return _message(headers[RECORD], headers["id"], headers["task"], payload, headers.get("retries") or 0)
    except (KeyError, TypeError) as error:
        raise ValueError(f"its record cannot be read: {error!r}") from error


def header_fault(headers: Any) -> str | None:
    """What is wrong with the headers of a message (Celery's task protocol 2); None where nothing is.

    A Celery worker ends over some of these faults, and so does the next one, to which the message goes.
    """
    if not isinstance(headers, Mapping):
        return "it has no headers"
    for name in ("id", "task"):
        if not (isinstance(headers.get(name), str) and headers[name]):
            return f"its header {name} is missing"
    match headers.get("timelimit"):
        case None | [None | int() | float(), None | int() | float()]:
            pass
        case _:
            return "its header timelimit is not a pair of seconds"
    return None


def body_fault(body: bytes) -> str | None:
    """What is wrong with the body of a message, likewise."""
    try:
        content = orjson.loads(body)
    except ValueError:
        return "its body is not JSON"
    match content:
        case [list(), dict(), dict() | None]:
            return None
    return "its body is not a list of arguments, keywords and embedded tasks"


def _message(header: Mapping[str, Any], task_id: str, name: str, payload: Mapping[str, Any], retries: int) -> Message:
    return Message(
        task_id=task_id,
        name=name,
        queue=header["queue"],
        payload=payload,
        digest=header["digest"],
        request_id=header["request_id"],
        owner=header["owner"],
        epoch=header["epoch"],
        retries=retries,
        publish=header["publish"],
        created_at=header["created_at"],
        workflow=header.get("workflow", ""),  # messages of an older version have none
    )
