"""Running loops side by side, and ending them for certain."""

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any

import structlog

from app.telemetry import Pulse

log = structlog.get_logger(__name__)

PAUSE = 1.0  # seconds, and up to as many again, after something has failed
AGAIN = 0.5  # seconds until a task that has not ended is cancelled once more


async def forever(work: Callable[[], Awaitable[Any]], name: str, errors: tuple[type[Exception], ...]) -> None:
    """Do `work` again and again until cancelled; one of `errors` says that a server is away, which is waited for."""
    while True:
        try:
            await work()
        except errors as error:
            log.warning("a loop waits", loop=name, error=f"{type(error).__name__}: {error}")
        except Exception:
            # A mistake of ours must not end all that this process does.
            log.exception("a loop failed", loop=name)
        else:
            continue
        await asyncio.sleep(PAUSE * random.uniform(1, 2))  # noqa: S311  not for secrets


async def together(works: Collection[Coroutine[Any, Any, None]]) -> None:
    """Run `works` until one of them ends, which is none's business, or this is cancelled; then end the others.

    Raises what the first one raised.
    """
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await end(tasks)


async def end(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they have ended.

    Cancelled itself, it ends them all the same. To cancel once may not do: in Python 3.11 `wait_for`, by which redis-py
    sends, swallows a cancellation that comes as it succeeds.
    """
    running = set(tasks)
    cancelled = False
    while running:
        for task in running:
            task.cancel()
        try:
            _, running = await asyncio.wait(running, timeout=AGAIN)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError


async def pulse(beat: Pulse) -> None:
    """Show that the event loop turns."""
    while True:
        beat.beat()
        await asyncio.sleep(Pulse.interval)


async def told_to_stop() -> None:
    """Return when the process gets SIGTERM or SIGINT; to be awaited once a process."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
