from typing import Any

import pytest
import redis
from redis.exceptions import ConnectionError as RedisConnectionError

from app.engine.breakers import Breakers, _shown


class Away(redis.Redis):
    """A Redis that does not answer."""

    def execute_command(self, *_: Any, **__: Any) -> Any:
        raise RedisConnectionError("away")


def test_without_redis_every_call_passes_and_nothing_is_told():
    breakers = Breakers(Away(), failures=1, window=1, seconds=1, lease=1)
    for _ in range(3):
        leave = breakers.enter("payment")
        assert leave.generation is None
        breakers.report(leave, well=False)


def test_a_breaker_that_nobody_has_used_is_closed():
    shown = _shown("tax", {"state": None, "failures": None, "opened_at": None, "retry_at": None})
    assert (shown.name, shown.state, shown.failures, shown.opened_at, shown.retry_at) == (
        "tax",
        "closed",
        0,
        None,
        None,
    )


@pytest.mark.parametrize("retry_at", ["0", ""])
def test_a_closed_breaker_shows_no_times(retry_at: str):
    row = {"state": "closed", "failures": '["1"]', "opened_at": "", "retry_at": retry_at}
    shown = _shown("tax", row)
    assert (shown.failures, shown.opened_at, shown.retry_at) == (1, None, None)


def test_an_open_breaker_shows_its_times():
    row = {"state": "open", "failures": "[]", "opened_at": "1700000000000000", "retry_at": "1700000010000000"}
    shown = _shown("tax", row)
    assert shown.retry_at is not None
    assert shown.opened_at is not None
    assert (shown.retry_at - shown.opened_at).total_seconds() == 10
