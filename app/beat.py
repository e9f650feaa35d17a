"""The one background process: `python -m app.beat`. A lease, and under it the loops that must not sit in a queue.

Any number may run; the one that holds the lease works, the others stand by. The lease only saves work: each loop
is safe with two of its kind.
"""

import asyncio
from contextlib import suppress

import structlog
from redis.asyncio.lock import Lock
from redis.exceptions import LockError, OutOfMemoryError, RedisError

from app.context import Context, open_context
from app.engine.loops import pulse, together, told_to_stop
from app.settings import get_settings
from app.telemetry import Pulse, configure_logging
from app.watchman import watched

LEASE = 10.0  # seconds; taken over by another process this long after its holder died
RENEW = 3.0  # seconds between renewals
LEASE_KEY = "beat:lease"

log = structlog.get_logger("app.beat")


async def lead(context: Context) -> None:
    """Wait for the lease, run the loops while it is held; returns when it is lost."""
    lock = context.redis.lock(LEASE_KEY, timeout=LEASE, sleep=RENEW / 2)
    try:
        await lock.acquire()
    except OutOfMemoryError:
        # A full Redis takes no lease, and only archiving makes room.
        log.warning("Redis is full: leading without the lease")
        with suppress(TimeoutError):
            await asyncio.wait_for(together(context.loops()), LEASE)
        return
    log.info("leading")
    try:
        await together([*context.loops(), renew(lock)])
    finally:
        with suppress(RedisError):
            await lock.release()


async def renew(lock: Lock) -> None:
    """Keep the lease. Raises `LockError` when it is lost, `RedisError` when Redis cannot serve."""
    while True:
        await asyncio.sleep(RENEW)
        await lock.reacquire()


async def stand(context: Context) -> None:
    """Lead, lose the lease, stand by, lead again, until cancelled."""
    while True:
        try:
            await lead(context)
        except (LockError, RedisError) as error:
            log.warning("lease lost", error=f"{type(error).__name__}: {error}")
            await asyncio.sleep(RENEW)


async def main() -> None:
    """Run until SIGTERM or SIGINT; hands the lease over at the end."""
    settings = get_settings()
    configure_logging(settings)
    async with open_context(settings, service="beat") as context, watched(settings.loop_block_warning):
        await together([stand(context), pulse(Pulse(settings.alive_file)), told_to_stop()])


if __name__ == "__main__":
    asyncio.run(main())
