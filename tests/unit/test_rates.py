"""A run that waits for its turn: it starts, is put off, or is cancelled meanwhile."""

from types import SimpleNamespace
from typing import Any

import pytest

import app.engine.task as task_module
from app.engine.message import Message
from app.engine.task import TURN_WAIT, Task

MESSAGE = Message("t-1", "n", "light", {}, digest="d", request_id="r", retries=2, publish="p", run=1)


class Worker:
    """As much of a task's surroundings as waiting for a turn touches."""

    name = "n"
    _has_turn = Task._has_turn  # noqa: SLF001

    def __init__(self, answer: tuple[bool, float], *, cancelling: bool = False, written: str = "RETRY") -> None:
        self.asked: list[Any] = []
        self.put_off: list[Any] = []
        self.revoked = 0
        store = SimpleNamespace(
            reserve=lambda *arguments: (self.asked.append(arguments), answer)[1],
            cancelling=lambda _: cancelling,
            retry=lambda *arguments: (self.put_off.append(arguments), written)[1],
        )
        self.backend = SimpleNamespace(store=store, patience=1)
        self.published: list[tuple[int, int]] = []

    def _publish_again(self, _message: Message, retries: int, countdown: int) -> None:
        self.published.append((retries, countdown))

    def _revoke(self, _message: Message) -> None:
        self.revoked += 1


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only sleeping moves."""
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append)
    monkeypatch.setattr(task_module, "time", clock)
    return slept


def test_it_waits_until_its_turn(slept: list[float]):
    worker = Worker((True, 1.1))
    assert worker._has_turn(MESSAGE, 5)  # noqa: SLF001
    assert worker.asked == [("n", 5, TURN_WAIT)]
    assert sum(slept) == pytest.approx(1.1)
    assert max(slept) <= 0.25
    assert not worker.published


def test_it_starts_at_once_when_it_is_its_turn(slept: list[float]):
    assert Worker((True, 0.0))._has_turn(MESSAGE, 5)  # noqa: SLF001
    assert not slept


def test_it_is_put_off_as_the_same_attempt_when_its_turn_is_far(slept: list[float]):
    worker = Worker((False, 3.2))
    assert not worker._has_turn(MESSAGE, 5)  # noqa: SLF001
    ((message, countdown, error),) = worker.put_off
    assert (message, error) == (MESSAGE, None)
    assert worker.published == [(2, countdown)]
    assert countdown in range(4, 8)
    assert not slept


@pytest.mark.usefixtures("slept")
def test_it_is_not_published_where_it_was_cancelled_or_superseded():
    for written in ("CANCELLED", "lost"):
        worker = Worker((False, 3.2), written=written)
        assert not worker._has_turn(MESSAGE, 5)  # noqa: SLF001
        assert not worker.published


def test_it_stops_when_it_is_cancelled_while_it_waits(slept: list[float]):
    worker = Worker((True, 2.0), cancelling=True)
    assert not worker._has_turn(MESSAGE, 5)  # noqa: SLF001
    assert worker.revoked == 1
    assert sum(slept) == 0.25
