"""Quotas: how many requests an API key may make, counted in Redis over all replicas (a token bucket a key).

They protect others from one client, so they must not become what fails: where Redis does not answer at once, requests
pass uncounted. A bucket is one short key that expires, and there are no more of them than API keys; with Redis full
the script is refused, so that it never takes the room of a task.
"""

import asyncio
import math
import time
from dataclasses import dataclass
from importlib.resources import files
from typing import NamedTuple

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

log = structlog.get_logger(__name__)

SCRIPT = files("app.engine").joinpath("quotas.lua").read_text()
PAUSE = 2.0  # seconds without asking Redis after it failed, so that few requests wait for it
MICROSECONDS = 1_000_000  # a second
DAY = 86_400 * MICROSECONDS


@dataclass(frozen=True, slots=True)
class Quota:
    """`rate` requests a second, up to `burst` at once; a rate of 0 sets no limit, and the least is one a day."""

    rate: float
    burst: int

    @property
    def interval(self) -> int:
        """Microseconds in which a bucket gains one request."""
        return min(max(1, round(MICROSECONDS / self.rate)), DAY)

    @property
    def window(self) -> int:
        """Whole seconds in which an empty bucket fills."""
        return math.ceil(self.burst * self.interval / MICROSECONDS)


class Allowance(NamedTuple):
    """What a bucket answered: whether the request passes, how many more would, and the seconds until one more does."""

    passes: bool
    left: int
    wait: int


class Quotas:
    """The buckets. `timeout` in seconds bounds what counting may add to a request."""

    def __init__(self, redis: Redis, *, timeout: float) -> None:
        self._script = redis.register_script(SCRIPT)
        self._timeout = timeout
        self._away_until = 0.0

    async def take(self, key_id: str, quota: Quota) -> Allowance | None:
        """Count one request of an API key; None where there is no limit, or Redis cannot say."""
        if not quota.rate or time.monotonic() < self._away_until:
            return None
        try:
            async with asyncio.timeout(self._timeout):
                # Repeated by redis-py on a new connection, it may count twice: one request too many, no more.
                taken, left, wait = await self._script(keys=[f"quota:{key_id}"], args=[quota.interval, quota.burst])
        except (RedisError, TimeoutError) as error:
            self._away_until = time.monotonic() + PAUSE
            log.warning("request not counted, Redis cannot serve", error=f"{type(error).__name__}: {error}")
            return None
        return Allowance(bool(taken), left, math.ceil(wait / MICROSECONDS))
