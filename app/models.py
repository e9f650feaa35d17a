"""Request and response schemas of the API."""

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

import orjson
from cronsim import CronSim, CronSimError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.contracts import TASKS, EventName, Payload, Priority, Rehearsal, TaskName

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
    """A task that failed for good, an event that a service could not handle, or what was neither (`bad_envelope`)."""

    id: str
    task_id: str | None
    event_id: str | None = None
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
    task_id: str | None = None
    event_id: str | None = None
    status_url: str | None = None


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


JobState = Literal["PENDING", "IN_PROGRESS", "COMPLETED", "FAILED"]


class JobRequest(Body):
    """A job: its steps fetch, transform and store `payload`. `rehearsal` lets them be slow, or fail."""

    name: str = Field(min_length=1, max_length=200, examples=["nightly"])
    payload: Metadata = Field(default_factory=dict, description="Any JSON object up to 16 KiB and 8 levels.")
    rehearsal: Rehearsal = Rehearsal()


class JobAccepted(BaseModel):
    """The answer to a job: its id, and that of the task which runs it."""

    job_id: str
    task_id: str
    status: Literal["PENDING"] = "PENDING"
    message: str = "Accepted; poll Location."


class JobSummary(BaseModel):
    """A job; `name` is null where only its task is known yet. `message` says why it has failed."""

    job_id: str
    task_id: str
    name: str | None
    status: JobState
    message: str
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None


class JobStep(BaseModel):
    """A step that has begun."""

    step_number: int
    name: str
    status: Literal["IN_PROGRESS", "COMPLETED", "FAILED"]
    message: str
    started_at: datetime
    completed_at: datetime | None


class Job(JobSummary):
    """A job with the steps that have begun; those that were not run are not there. `result` is the last one's."""

    result: Any
    steps: list[JobStep]


def _time_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError("is no time zone (as Europe/Berlin is)") from error
    return name


def _known_task(name: str) -> str:
    if name not in TASKS:
        raise ValueError(f"is no task; there are {', '.join(sorted(TASKS))}")
    return name


class ScheduleFields(Body):
    """What a schedule is made of. What is stored is not checked again: a task of it may be gone since."""

    name: str = Field(min_length=1, max_length=200)
    task: str = Field(examples=["light.count_words"])
    payload: Metadata = Field(default_factory=dict, description="What the task takes.")
    interval: int | None = Field(
        default=None, ge=1, le=31_536_000, strict=True, description="Seconds between two fires."
    )
    crontab: str | None = Field(
        default=None, min_length=9, max_length=100, description="Five fields, or six with seconds first.",
        examples=["30 2 * * MON-FRI"],
    )  # fmt: skip
    timezone: str = Field(default="UTC", min_length=1, max_length=64)
    enabled: bool = True
    catch_up: Literal["none", "last", "all"] = Field(
        default="last", description="Which fires that nobody could make are made later: of `all`, the last 100."
    )


class ScheduleContent(ScheduleFields):
    """What an operator says of a schedule: which task it fires with which payload, and when.

    Either `interval` or `crontab`, the latter in `timezone`.
    """

    task: Annotated[str, AfterValidator(_known_task)] = Field(examples=["light.count_words"])
    timezone: Annotated[str, AfterValidator(_time_zone)] = Field(default="UTC", min_length=1, max_length=64)

    @model_validator(mode="after")
    def one_timing(self) -> Self:
        """Refuse what says twice or never when to fire, and a crontab that cannot be read, or has no next time."""
        if (self.interval is None) == (self.crontab is None):
            raise ValueError("either interval or crontab is expected")
        if self.crontab is not None:
            try:
                following = next(CronSim(self.crontab, datetime.now(ZoneInfo(self.timezone))), None)
            except CronSimError as error:
                raise ValueError(f"crontab: {error}") from error
            if following is None:
                raise ValueError("crontab: there is no such time within 50 years")
        return self

    @model_validator(mode="after")
    def fitting_payload(self) -> Self:
        """Refuse a payload that is not the task's."""
        contract: type[Payload] = TASKS[TaskName(self.task)].payload
        try:
            contract.model_validate(self.payload)
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, ('payload', *row['loc'])))}: {row['msg']}" for row in error.errors()]
            raise ValueError("; ".join(faults)) from error
        return self


class Schedule(ScheduleFields):
    """A schedule as stored. `version` counts its changes, not its fires, and is its ETag."""

    model_config = ConfigDict(extra="ignore")

    id: str
    version: int
    created_at: datetime
    updated_at: datetime
    last_run: datetime | None
    next_run: datetime | None = Field(description="Null while it is not enabled.")


class Fire(BaseModel):
    """One time at which a schedule fired. `pending` until its task was published; `refused` if it never can be."""

    fire_time: datetime
    status: Literal["pending", "published", "refused"]
    task_id: str
    published_at: datetime | None
    message: str


class ScheduleShown(Schedule):
    """A schedule with its latest fires."""

    fires: list[Fire]


class SchedulePage(BaseModel):
    """A page of schedules, oldest first; `next_cursor` is null on the last."""

    schedules: list[Schedule]
    next_cursor: str | None


class EventRequest(Body):
    """Something that has happened."""

    event_type: EventName = Field(description="What; the stack's own types are refused.", examples=["user.created"])
    data: dict[str, Any] = Field(description="As the type's schema has it.", examples=[{"user_id": "u-1"}])


class EventAccepted(BaseModel):
    """The answer to an event that was published: every subscribed service will get it."""

    event_id: str
    event_type: EventName
    time: Moment


# How a service behind the gateway is, in its own words; where it has none, as a request to it fares: 503, 504, 502.
ServiceHealth = Literal["healthy", "degraded", "unhealthy", "unreachable", "slow", "broken"]


class GatewayService(BaseModel):
    """A service behind the gateway; `prefix` is where its paths begin."""

    name: str
    title: str
    prefix: str
    health: ServiceHealth


class GatewayStatus(BaseModel):
    """The services behind the gateway together."""

    status: Literal["healthy", "degraded", "unhealthy"]
    services: dict[str, ServiceHealth]
    timestamp: datetime
