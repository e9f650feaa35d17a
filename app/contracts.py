"""What API, workers and services share: the names of tasks and queues, and the payload of each task.

A new kind of work starts here: a name in `TaskName`, a payload class, and its row in `TASKS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Queue(StrEnum):
    """The task queues; a queue's name is its routing key."""

    HEAVY_HIGH = "heavy.high"
    HEAVY = "heavy"
    HEAVY_LOW = "heavy.low"
    LIGHT = "light"


class Priority(StrEnum):
    """How urgent a heavy task is; each has a queue of its own."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


HEAVY_QUEUES = {Priority.LOW: Queue.HEAVY_LOW, Priority.NORMAL: Queue.HEAVY, Priority.HIGH: Queue.HEAVY_HIGH}


class TaskName(StrEnum):
    """The names under which tasks travel; API and workers know each other by these alone."""

    PROCESS_DATA = "heavy.process_data"
    COUNT_WORDS = "light.count_words"
    RUN_JOB = "jobs.run"


class EventName(StrEnum):
    """The types of events, and the routing keys under which they travel."""

    TASK_FAILED = "task.failed"


def nested_deeper(value: Any, levels: int) -> bool:
    """Whether a JSON value holds objects or arrays in more than `levels` levels: what comes from outside is bounded."""
    if isinstance(value, Mapping):
        children = list(value.values())
    elif isinstance(value, (list, tuple)):
        children = list(value)
    else:
        return False
    return levels == 0 or any(nested_deeper(child, levels - 1) for child in children)


class Payload(BaseModel):
    """Base of all payloads: unknown fields are refused, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ProcessData(Payload):
    """`heavy.process_data`: derive `iterations` digests from `data`."""

    data: str
    iterations: int = Field(ge=1, le=100_000)


class CountWords(Payload):
    """`light.count_words`: count the words of `text`."""

    text: str


class Rehearsal(Payload):
    """How a job is to go wrong, so that it can be seen: nothing by default."""

    seconds: float = Field(default=0, ge=0, le=60, allow_inf_nan=False, description="What each step takes at least.")
    step: int | None = Field(default=None, ge=1, le=100, description="The number of a step that fails.")
    failures: int = Field(
        default=1, ge=1, le=1_000, description="The runs of the task in which it does, from the first."
    )
    permanent: bool = Field(default=False, description="Whether another attempt is of no use.")


class RunJob(Payload):
    """`jobs.run`: the steps of `app/tasks/jobs.py` over `payload`; the job's id follows from the task's."""

    name: str
    payload: dict[str, Any] = Field(default_factory=dict)
    rehearsal: Rehearsal = Rehearsal()


@dataclass(frozen=True, slots=True)
class TaskContract:
    """What a publisher has to know of a task: its payload's schema and the queue it goes to unless told otherwise."""

    payload: type[Payload]
    queue: Queue


TASKS = {
    TaskName.PROCESS_DATA: TaskContract(ProcessData, Queue.HEAVY),
    TaskName.COUNT_WORDS: TaskContract(CountWords, Queue.LIGHT),
    TaskName.RUN_JOB: TaskContract(RunJob, Queue.HEAVY),
}
