"""Request and response schemas of the API."""

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from app.contracts import Priority

METADATA_MAX_BYTES = 16 * 1024
METADATA_MAX_DEPTH = 8
TEXT_MAX_BYTES = 64 * 1024
INT64 = range(-(2**63), 2**63)


def _storable(value: Any, depth: int) -> None:  # noqa: C901  one case a JSON type
    """Refuse what JSON can say but BSON, or a query over it, would trip on. Raises `ValueError`."""
    if depth > METADATA_MAX_DEPTH:
        raise ValueError(f"is nested deeper than {METADATA_MAX_DEPTH} levels")
    match value:
        case Mapping():
            for key, child in value.items():
                if not key or key.startswith("$") or "." in key or "\0" in key:
                    raise ValueError("has a key that is empty, starts with $, or contains a dot or NUL")
                key.encode()
                _storable(child, depth + 1)
        case list():
            for child in value:
                _storable(child, depth + 1)
        case str():
            value.encode()
        case bool() | None:
            return
        case int() if value not in INT64:
            raise ValueError("has an integer that does not fit 64 bits")
        case float() if not math.isfinite(value):
            raise ValueError("has a number that is not finite")


def _metadata(value: dict[str, Any]) -> dict[str, Any]:
    _storable(value, 0)
    if len(orjson.dumps(value)) > METADATA_MAX_BYTES:
        raise ValueError(f"is larger than {METADATA_MAX_BYTES} bytes")
    return value


def _text(value: str) -> str:
    if len(value.encode()) > TEXT_MAX_BYTES:
        raise ValueError(f"is larger than {TEXT_MAX_BYTES} bytes")
    return value


Metadata = Annotated[dict[str, Any], AfterValidator(_metadata)]
Text = Annotated[str, AfterValidator(_text)]
# Records keep times as they are answered (ISO 8601, UTC, milliseconds): to parse them again would be for nothing.
Moment = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


class Body(BaseModel):
    """Base of request bodies: a misspelt field is an error, not silence."""

    model_config = ConfigDict(extra="forbid")


class ItemContent(Body):
    """What a client says of an item."""

    name: str = Field(min_length=1, max_length=200)
    description: str = Field(default="", max_length=2000)
    category: str | None = Field(default=None, min_length=1, max_length=100)
    metadata: Metadata = Field(default_factory=dict, description="Any JSON object up to 16 KiB and 8 levels.")


class Item(ItemContent):
    """An item as stored. `version` counts its changes and is its ETag."""

    model_config = ConfigDict(extra="ignore")

    id: str
    version: int
    created_at: datetime
    updated_at: datetime


class ItemPage(BaseModel):
    """A page of items, oldest first; `next_cursor` is null on the last."""

    items: list[Item]
    next_cursor: str | None


class ProcessRequest(Body):
    """A heavy task: `iterations` digests are derived from `data`."""

    data: Text = Field(description="Up to 64 KiB of text.", examples=["hello"])
    iterations: int = Field(default=100, ge=1, le=100_000, strict=True)
    priority: Priority = Priority.NORMAL


class CountWordsRequest(Body):
    """A light task: the words of `text` are counted."""

    text: Text = Field(description="Up to 64 KiB of text.", examples=["to be or not to be"])


class TaskAccepted(BaseModel):
    """The answer to a submit."""

    task_id: str
    status: Literal["PENDING"] = "PENDING"
    message: str = "Accepted; poll status_url."
    status_url: str


class RowProblem(BaseModel):
    """Why one row of a batch was not accepted, as problems are told (RFC 9457); `loc` is relative to the row."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[dict[str, Any]] | None = None


class BatchAccepted(BaseModel):
    """The answer to a batch: `results` has a row's task or its problem, in the order of the rows."""

    accepted: int
    refused: int
    results: list[TaskAccepted | RowProblem]


class TaskProgress(BaseModel):
    """How far a task has come; `progress` is in percent."""

    current: int
    total: int
    progress: float


class TaskFailure(BaseModel):
    """Why a task failed, or why its last attempt did."""

    type: str
    message: str


class TaskStatus(BaseModel):
    """All that is known of a task."""

    task_id: str
    name: str
    status: Literal["PENDING", "STARTED", "PROGRESS", "RETRY", "SUCCESS", "FAILURE", "CANCELLED"]
    progress: TaskProgress | None
    result: Any
    error: TaskFailure | None
    attempts: int = Field(description="How often a worker has started it.")
    queue: str
    request_id: str = Field(description="The X-Request-ID of the submit.")
    workflow: str = Field(default="", description="The workflow that it is a member of; empty if of none.")
    created_at: Moment
    started_at: Moment | None
    finished_at: Moment | None


class TaskCancelled(BaseModel):
    """The answer to a cancel: a running task is CANCELLING until it notices."""

    task_id: str
    status: Literal["CANCELLED", "CANCELLING"]
    status_url: str


class DeadLetter(BaseModel):
    """A task that failed for good, or a message that was no task (`bad_envelope`), which has no `task_id`."""

    id: str
    task_id: str | None
    name: str | None
    queue: str
    reason: str = Field(
        description="`permanent`, `exhausted` (its attempts), `time_limit`, `unknown_task`, `poison` or `bad_envelope`."
    )
    error: TaskFailure
    attempts: int
    request_id: str | None
    workflow: str = Field(default="", description="The workflow that it was a member of; empty if of none.")
    state: Literal["open", "replayed", "discarded"]
    died_at: datetime
    settled_at: datetime | None
    settled_by: str | None
    message: dict[str, Any] = Field(description="What it takes to run it again: payload and time of creation.")


class DeadLetterPage(BaseModel):
    """A page of dead letters, the latest first; `next_cursor` is null on the last."""

    dead_letters: list[DeadLetter]
    next_cursor: str | None


class Replayed(BaseModel):
    """The answer to a replay."""

    id: str
    task_id: str
    status_url: str


class Health(BaseModel):
    """Which servers answer. `degraded`: some part of the API is away; `unhealthy`: nothing can be served.

    `draining`: this replica has been told to stop.
    """

    status: Literal["healthy", "degraded", "unhealthy", "draining"]
    timestamp: datetime
    services: dict[Literal["mongodb", "redis", "rabbitmq"], Literal["connected", "disconnected"]]


class CircuitBreaker(BaseModel):
    """How a backend is called: `closed` freely, `open` not before `retry_at`, `half_open` by one call, the probe.

    `failures` within BREAKER_WINDOW when the last one came; of a half-open one `retry_at` is when its probe counts as
    lost. An open breaker becomes half-open by the first call after `retry_at`.
    """

    name: str
    state: Literal["closed", "open", "half_open"]
    failures: int
    opened_at: datetime | None
    retry_at: datetime | None


class CircuitBreakers(BaseModel):
    """All backends' breakers."""

    breakers: list[CircuitBreaker]


class WorkflowAccepted(BaseModel):
    """The answer to the start of a workflow."""

    workflow_id: str
    status: Literal["PENDING", "STARTED", "COMPENSATING", "SUCCESS", "FAILURE", "CANCELLED"]
    message: str = "Accepted; poll status_url."
    status_url: str


class WorkflowTask(BaseModel):
    """A member of a workflow, or what takes one back: the task, and as much of its state as is known here.

    WAITING: for others that come before it. SKIPPED: the workflow ended without it.
    """

    task_id: str
    task: str
    status: Literal["WAITING", "PENDING", "STARTED", "PROGRESS", "RETRY", "SUCCESS", "FAILURE", "CANCELLED", "SKIPPED"]
    progress: TaskProgress | None
    result: Any
    error: TaskFailure | None
    attempts: int
    started_at: Moment | None
    finished_at: Moment | None


class WorkflowFailure(TaskFailure):
    """Why a workflow failed; `member` names the one that did."""

    member: str | None


class WorkflowStatus(BaseModel):
    """All that is known of a workflow.

    COMPENSATING: it was stopped, or a member failed, and what was done is taken back.
    """

    workflow_id: str
    kind: str
    status: Literal["PENDING", "STARTED", "COMPENSATING", "SUCCESS", "FAILURE", "CANCELLED"]
    progress: TaskProgress = Field(
        description="Members that have ended well, of all; the percentage has their progress."
    )
    result: Any
    error: WorkflowFailure | None
    members: dict[str, WorkflowTask]
    compensations: dict[str, WorkflowTask] = Field(description="What takes a member back, by the member's name.")
    uncompensated: list[str] = Field(description="Members whose effects could not be taken back.")
    request_id: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class WorkflowCancelled(BaseModel):
    """The answer to a cancel: COMPENSATING until all that ran has ended and is taken back."""

    workflow_id: str
    status: Literal["CANCELLED", "COMPENSATING"]
    status_url: str
