"""Workflows that only tests need: of tasks that fail, wait and return what they are told to."""

from typing import Any

from app.contracts import Payload, Queue
from app.engine.workflows import Definition, Results, Step, Undo, chain, chord
from tests.integration.tasks import Failures, Size, Steps


class Trip(Payload):
    """Three steps and three undos; `middle` and `undo` are the tasks that the second one is made of."""

    middle: str = "test.noted"
    undo: str = "test.noted"
    failures: int = 0
    steps: int = 1
    seconds: float = 0.05
    mark: str = "undo-b"


class Wide(Payload):
    """`size` members side by side, and one that has all their results."""

    size: int = 2
    task: str = "test.member"


def noted(name: str) -> Step:
    undo = Undo("test.noted", lambda _: Failures(failures=0, mark=f"undo-{name}"), Queue.LIGHT)
    return Step(name, "test.noted", lambda _: Failures(failures=0, mark=name), undo=undo, queue=Queue.LIGHT)


def trip(request: Trip) -> list[Step]:
    def middle(_: Results) -> Payload:
        if request.middle == "test.steps":
            return Steps(steps=request.steps, seconds=request.seconds)
        return Failures(failures=request.failures, mark="b")

    undo = Undo(request.undo, lambda _: Failures(failures=0, mark=request.mark), Queue.LIGHT)
    queue = Queue.HEAVY if request.middle in ("test.steps", "test.poison") else Queue.LIGHT
    return chain(noted("a"), Step("b", request.middle, middle, undo=undo, queue=queue), noted("c"))


def wide(request: Wide) -> list[Step]:
    members = [
        Step(f"m{number}", request.task, lambda _: Size(size=0), queue=Queue.LIGHT) for number in range(request.size)
    ]

    return chord(members, Step("last", "test.large", lambda results: Size(size=len(results)), queue=Queue.LIGHT))


def everything(results: Results) -> dict[str, Any]:
    return dict(results)


DEFINITIONS = {
    definition.kind: definition
    for definition in (
        Definition("test-trip", Trip, trip, everything),
        Definition("test-wide", Wide, wide, everything),
    )
}
