"""Tells when the event loop was blocked: by a call that should have been awaited, or by work that belongs to a worker.

A timer that comes late shows it. What was late for other reasons is not counted, where the system tells: time in which
the thread could have run and no CPU was free (Linux), and a process that was stopped and continued by signals.
"""

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from types import FrameType

import structlog

INTERVAL = 0.05  # seconds between two looks: a block is seen to this precision
PAUSE = 1.0  # seconds between two log lines; the later one tells of the longest block since
SCHEDSTAT = "/proc/thread-self/schedstat"  # nanoseconds on a CPU, nanoseconds waiting for one, turns

log = structlog.get_logger("app.watchman")


def blocked_for(gap: float, waited: float, interval: float = INTERVAL) -> float:
    """Seconds that a loop stood still, if its timer of `interval` came `gap` after the one before.

    `waited` of them it was ready to run and no CPU was free: that is the machine, not the loop.
    """
    return max(0.0, gap - interval - waited)


class RunQueue:
    """How long the thread that made this has waited for a CPU so far; always 0 where the system does not tell."""

    def __init__(self, path: str = SCHEDSTAT) -> None:
        self._file = -1
        with suppress(OSError):
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def waited(self) -> float:
        """Seconds; from whichever thread it is called."""
        if self._file < 0:
            return 0.0
        return int(os.pread(self._file, 64, 0).split()[1]) / 1e9

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)


class Watchman:
    """Looks at the running loop every `INTERVAL`; blocks longer than `limit` seconds are logged."""

    def __init__(self, limit: float, run_queue: RunQueue) -> None:
        self._limit = limit
        self._run_queue = run_queue
        self._loop = asyncio.get_running_loop()
        self._stopped = False
        self._longest = 0.0
        self._quiet_until = 0.0
        self._remember()

    def continued(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        """Leave the present gap out: the process was stopped in it (handler of SIGCONT)."""
        self._stopped = True

    def cancel(self) -> None:
        """Look no more."""
        self._timer.cancel()

    def _remember(self) -> None:
        self._seen, self._waited = time.monotonic(), self._run_queue.waited()
        self._timer = self._loop.call_later(INTERVAL, self._look)

    def _look(self) -> None:
        now = time.monotonic()
        gap = now - self._seen
        if gap - INTERVAL > self._limit and not self._stopped:
            blocked = blocked_for(gap, self._run_queue.waited() - self._waited)
            if blocked > self._limit:
                self._longest = max(self._longest, blocked)
        if self._longest and now >= self._quiet_until:
            log.warning("event loop blocked", ms=round(self._longest * 1000))
            self._longest, self._quiet_until = 0.0, now + PAUSE
        self._stopped = False
        self._remember()


@asynccontextmanager
async def watched(limit: float) -> AsyncIterator[None]:
    """Watch the running loop meanwhile; blocks longer than `limit` seconds are logged as `event loop blocked`."""
    run_queue = RunQueue()
    watchman = Watchman(limit, run_queue)
    try:
        with _told_of_stops(watchman):
            yield
    finally:
        watchman.cancel()
        run_queue.close()


@contextmanager
def _told_of_stops(watchman: Watchman) -> Iterator[None]:
    # Only the main thread may set a handler, and somebody else's is left alone.
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGCONT) is not signal.SIG_DFL
    ):
        yield
        return
    signal.signal(signal.SIGCONT, watchman.continued)
    try:
        yield
    finally:
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
