import asyncio

import pytest

from app.engine.loops import end, together


async def deaf(times: int) -> None:
    """Swallows its first cancellations, as `wait_for` may."""
    for _ in range(times):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            continue
    await asyncio.sleep(60)


async def test_a_task_that_swallows_a_cancellation_is_ended_all_the_same():
    task = asyncio.create_task(deaf(2))
    await asyncio.sleep(0)
    await end([task])
    assert task.cancelled()


async def test_whoever_ends_tasks_ends_them_even_if_it_is_cancelled():
    task = asyncio.create_task(deaf(1))
    await asyncio.sleep(0)
    ending = asyncio.create_task(end([task]))
    await asyncio.sleep(0)
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending
    assert task.cancelled()


async def test_the_first_end_ends_all_and_its_error_is_told():
    others = []

    async def other() -> None:
        others.append(asyncio.current_task())
        await asyncio.sleep(60)

    async def failing() -> None:
        await asyncio.sleep(0)
        raise OSError("it fails")

    with pytest.raises(OSError, match="it fails"):
        await together([other(), failing(), other()])
    assert len(others) == 2
    assert all(task.cancelled() for task in others)
