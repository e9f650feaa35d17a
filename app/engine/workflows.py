"""Workflows: what a definition says of its members."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from app.contracts import Payload, TaskName

Results = Mapping[str, Any]  # what ended members returned, by name


@dataclass(frozen=True, slots=True)
class Undo:
    """The task that takes back what a member has done, or may have done: it must do no harm where nothing was."""

    task: TaskName
    payload: Callable[[Results], Payload]


@dataclass(frozen=True, slots=True)
class Step:
    """A member of a workflow: a task that runs once those in `after` have succeeded.

    `payload` is a pure function of their results (by name): whoever makes it, it is the same.
    """

    name: str
    task: TaskName
    payload: Callable[[Results], Payload]
    after: tuple[str, ...] = ()
    undo: Undo | None = None


@dataclass(frozen=True, slots=True)
class Definition:
    """A kind of workflow: what is asked for, the members that this means, and the result that theirs make."""

    kind: str
    request: type[Payload]
    steps: Callable[[Any], Sequence[Step]]
    outcome: Callable[[Results], Any]


def chain(*steps: Step) -> list[Step]:
    """One after the other: each waits for the one before, beside what it names itself."""
    linked = list(steps[:1])
    for before, step in pairwise(steps):
        linked.append(replace(step, after=(*step.after, before.name)))
    return linked


def chord(group: Sequence[Step], last: Step) -> list[Step]:
    """Side by side, and `last` once all of them have succeeded."""
    return [*group, replace(last, after=(*last.after, *(step.name for step in group)))]
