"""Workflows: what a definition says of its members."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from app.contracts import Payload, Queue, TaskName

Results = Mapping[str, Any]  # what ended members returned, by name

MEMBERS_MAX = 1_000
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")  # of a step: a field's name in MongoDB


@dataclass(frozen=True, slots=True)
class Undo:
    """The task that takes back what a member has done, or may have done: it must do no harm where nothing was.

    `payload` is a pure function of the results of all members that succeeded: one that failed has none. `queue` is the
    contract's unless one is given.
    """

    task: TaskName
    payload: Callable[[Results], Payload]
    queue: Queue | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A member of a workflow: a task that runs once those in `after` have succeeded.

    `payload` is a pure function of their results, and of the results of those before them (by name): whoever makes it,
    it is the same. `queue` is the contract's unless one is given.
    """

    name: str
    task: TaskName
    payload: Callable[[Results], Payload]
    after: tuple[str, ...] = ()
    undo: Undo | None = None
    queue: Queue | None = None


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


class Flow:
    """The members that one request means, in an order in which each comes after those that it waits for.

    Raises `ValueError` for what can be no workflow: that is a mistake of its definition.
    """

    def __init__(self, steps: Iterable[Step]) -> None:
        self.steps: dict[str, Step] = {}
        for step in steps:
            if not NAME.fullmatch(step.name) or step.name in self.steps:
                raise ValueError(f"{step.name!r} is no name of a step, or there are two of it")
            if unknown := set(step.after) - self.steps.keys():
                raise ValueError(f"{step.name} comes after {sorted(unknown)}, which do not come before it")
            self.steps[step.name] = step
        if not 1 <= len(self.steps) <= MEMBERS_MAX:
            raise ValueError(f"a workflow has 1 to {MEMBERS_MAX} members, not {len(self.steps)}")

    def before(self, name: str) -> set[str]:
        """The members that must have succeeded before `name` begins, near and far."""
        found = set[str]()
        waiting = list(self.steps[name].after)
        while waiting:
            one = waiting.pop()
            if one not in found:
                found.add(one)
                waiting += self.steps[one].after
        return found

    def results(self, members: Mapping[str, Mapping[str, Any]], name: str | None = None) -> dict[str, Any]:
        """The results of the members that succeeded; of those before `name` alone, where one is given."""
        wanted = self.steps.keys() if name is None else self.before(name)
        return {
            one: json.loads(members[one]["result"])
            for one in self.steps
            if one in wanted and members[one]["result"] is not None
        }
