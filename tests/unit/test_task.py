from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded

from app.engine.errors import PermanentError, ResultNotJsonError, ResultTooLargeError, error_of
from app.engine.task import HeavyTask, LightTask, backoff


@pytest.mark.parametrize(
    ("retries", "latest"), [(0, 2), (1, 4), (2, 8), (3, 16), (8, 512), (9, 600), (31, 600), (10**6, 600)]
)
def test_backoff_is_whole_seconds_within_its_bounds(retries: int, latest: int):
    pauses = [backoff(retries, 600) for _ in range(500)]
    assert all(type(pause) is int for pause in pauses)
    assert min(pauses) >= 1
    assert max(pauses) <= latest


@pytest.mark.parametrize("retries", [0, 1, 2])
def test_backoff_has_full_jitter(retries: int):
    assert {backoff(retries, 600) for _ in range(1000)} == set(range(1, 2 ** (retries + 1) + 1))


def test_backoff_is_capped():
    assert max(backoff(20, 5) for _ in range(500)) == 5
    assert {backoff(3, 1) for _ in range(100)} == {1}


def test_heavy_work_is_tried_again_three_times_and_light_work_until_it_is_done():
    assert HeavyTask.max_retries == 3
    assert LightTask.max_retries is None


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("no such thing"), "ValueError", "no such thing"),
        (PermanentError("never"), "failed", "never"),
        (ResultTooLargeError("9 bytes"), "result_too_large", "9 bytes"),
        (ResultNotJsonError("a set"), "result_not_json", "a set"),
        (SoftTimeLimitExceeded(), "time_limit_exceeded", "The task ran longer than it may."),
        (TimeLimitExceeded(660), "time_limit_exceeded", "The task ran longer than it may."),
    ],
)
def test_errors_have_a_name_in_the_record(error: Exception, kind: str, message: str):
    assert error_of(error) == {"type": kind, "message": message}


class Hooked(HeavyTask):
    abstract = True
    calls: ClassVar[list[str]] = []

    def on_failure(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:  # noqa: ARG002
        """Note it, and fail."""
        self.calls.append(task_id)
        raise OSError


def test_a_hook_is_called_by_who_wrote_the_state_and_its_error_goes_nowhere():
    task = Hooked()
    task.backend = SimpleNamespace(settled="t-1")
    for task_id in ("t-2", "t-1"):
        task.on_failure(ValueError(), task_id, (), {}, None)
    assert Hooked.calls == ["t-1"]
    assert Hooked.on_failure.__doc__ == "Note it, and fail."
