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


@dataclass(frozen=True, slots=True)
class TaskContract:
    """What a publisher has to know of a task: its payload's schema and the queue it goes to unless told otherwise."""

    payload: type[Payload]
    queue: Queue


TASKS = {
    TaskName.PROCESS_DATA: TaskContract(ProcessData, Queue.HEAVY),
    TaskName.COUNT_WORDS: TaskContract(CountWords, Queue.LIGHT),
}
