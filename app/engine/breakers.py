"""Circuit breakers: a backend that fails is left alone for a while, by all workers together (one Redis hash each).

A breaker saves workers and a struggling backend the calls that would fail, so it must not become what fails: where
Redis does not answer, calls pass. See breakers.lua for the states.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

import orjson
import redis
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.engine.errors import TaskError

log = structlog.get_logger(__name__)

SCRIPT = files("app.engine").joinpath("breakers.lua").read_text()
MICROSECONDS = 1_000_000  # a second
PROBE = 2
PAUSE = 2.0  # seconds without asking Redis after it failed, so that few calls wait for it
FIELDS = ("state", "failures", "opened_at", "retry_at")


class BreakerOpenError(TaskError):
    """The backend has failed too often lately; it is not called for a while."""

    kind = "circuit_open"


@dataclass(frozen=True, slots=True)
class Pass:
    """Leave for one call: the breaker it is of, its generation (None where Redis did not say), and if it is a probe."""

    name: str
    generation: str | None
    probe: bool = False


@dataclass(frozen=True, slots=True)
class Breaker:
    """What a breaker shows: failures within the window, since when it is open, and when the next call may pass."""

    name: str
    state: str
    failures: int
    opened_at: datetime | None
    retry_at: datetime | None


def breaker_key(name: str) -> str:
    """The key of a backend's breaker."""
    return f"breaker:{name}"


class Breakers:
    """The breakers as those see them who call, without an event loop.

    `failures` within `window` seconds open one for `seconds`; a probe counts as dead after `lease` seconds, which is
    to be longer than a call can take.
    """

    def __init__(self, client: redis.Redis, *, failures: int, window: float, seconds: float, lease: float) -> None:
        self._script = client.register_script(SCRIPT)
        self._most = failures
        self._away_until = 0.0
        self._window, self._pause, self._lease = (round(each * MICROSECONDS) for each in (window, seconds, lease))

    def enter(self, name: str) -> Pass:
        """Leave to call a backend. Raises `BreakerOpenError`."""
        answer = self._run(name, "enter", self._lease)
        if answer is None:
            return Pass(name, None)
        passes, generation, wait = answer
        if not passes:
            seconds = max(1, round(wait / MICROSECONDS))
            raise BreakerOpenError(f"{name} has failed too often lately; it is called again in {seconds} s at most.")
        return Pass(name, generation, probe=passes == PROBE)

    def report(self, leave: Pass, *, well: bool) -> None:
        """Tell how the call went. Of one that began before the breaker's last change nothing is counted."""
        if leave.generation is None or (well and not leave.probe):
            return  # a closed breaker has nothing to learn of what is well
        if well:
            self._run(leave.name, "success", leave.generation)
        else:
            self._run(leave.name, "failure", leave.generation, self._most, self._window, self._pause)

    def _run(self, name: str, *words: Any) -> Any:
        """What the script answers; None where Redis cannot serve, or is left alone."""
        if time.monotonic() < self._away_until:
            return None
        try:
            return self._script(keys=[breaker_key(name)], args=words)
        except RedisError as error:
            self._away_until = time.monotonic() + PAUSE
            log.warning("breaker not asked, Redis cannot serve", backend=name, error=f"{type(error).__name__}: {error}")
            return None


async def breakers(client: Redis, names: Iterable[str]) -> list[Breaker]:
    """What the breakers of `names` show. Raises `redis.exceptions.RedisError`."""
    names = list(names)
    async with client.pipeline(transaction=False) as pipeline:
        for name in names:
            pipeline.hmget(breaker_key(name), FIELDS)
        rows = await pipeline.execute()
    return [_shown(name, dict(zip(FIELDS, row, strict=True))) for name, row in zip(names, rows, strict=True)]


def _shown(name: str, row: dict[str, str | None]) -> Breaker:
    return Breaker(
        name=name,
        state=row["state"] or "closed",
        failures=len(orjson.loads(row["failures"] or "[]")),
        opened_at=_moment(row["opened_at"]),
        retry_at=_moment(row["retry_at"]),
    )


def _moment(microseconds: str | None) -> datetime | None:
    number = int(microseconds or 0)
    return datetime.fromtimestamp(number / MICROSECONDS, UTC) if number else None
