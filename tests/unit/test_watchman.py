import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
import structlog

from app.watchman import INTERVAL, RunQueue, blocked_for, watched

LIMIT = 0.05


async def told(block, limit: float = LIMIT) -> list[int]:
    """Milliseconds of each block that was logged around a call of `block`."""
    with structlog.testing.capture_logs() as lines:
        async with watched(limit):
            await asyncio.sleep(2 * INTERVAL)
            block()
            await asyncio.sleep(2 * INTERVAL)
    return [line["ms"] for line in lines if line["event"] == "event loop blocked"]


def spin() -> None:
    until = time.thread_time() + 0.4
    while time.thread_time() < until:
        pass


def test_waiting_for_a_cpu_is_not_a_block():
    assert blocked_for(0.5, 0.0, 0.02) == pytest.approx(0.48)
    assert blocked_for(0.5, 0.4, 0.02) == pytest.approx(0.08)
    assert blocked_for(0.5, 0.49, 0.02) == 0
    assert blocked_for(0.02, 0.0, 0.02) == 0


@pytest.mark.parametrize("block", [lambda: time.sleep(0.4), spin])
async def test_a_blocking_call_is_seen(block):
    (milliseconds,) = await told(block)
    assert milliseconds >= 1000 * (0.4 - INTERVAL) - 1


async def test_what_waited_for_a_cpu_all_the_time_is_not_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(RunQueue, "waited", lambda _: time.monotonic())
    assert await told(lambda: time.sleep(0.4)) == []


async def test_a_shorter_block_is_not_told():
    assert await told(lambda: time.sleep(0.1), limit=20) == []


async def test_a_row_of_blocks_is_told_in_one_line_after_the_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("app.watchman.PAUSE", 3)
    with structlog.testing.capture_logs() as lines:
        async with watched(LIMIT):
            for seconds in (0.2, 0.4, 0.2):
                await asyncio.sleep(2 * INTERVAL)
                time.sleep(seconds)
            while len(lines) < 2:
                await asyncio.sleep(INTERVAL)
    assert lines[1]["ms"] >= 1000 * (0.4 - INTERVAL) - 1


async def test_a_process_that_was_stopped_is_not_told():
    # The handler of SIGCONT is all that differs between a stop and a call that sleeps.
    def stop() -> None:
        time.sleep(0.4)
        os.kill(os.getpid(), signal.SIGCONT)

    assert await told(stop) == []
    assert signal.getsignal(signal.SIGCONT) is signal.SIG_DFL


def test_a_thread_knows_how_long_it_waited_for_a_cpu(tmp_path: Path):
    file = tmp_path / "schedstat"
    file.write_text("350863439 2500000000 30\n")
    queue = RunQueue(str(file))
    assert queue.waited() == 2.5
    queue.close()


def test_where_the_system_does_not_tell_nothing_is_subtracted(tmp_path: Path):
    queue = RunQueue(str(tmp_path / "missing"))
    assert queue.waited() == 0
    queue.close()
