"""Summaries of a data set's chunks, and of those. The rows are made up here; read yours in `values`."""

from collections.abc import Iterator

from app.celery_app import celery
from app.contracts import Chunk, ChunkSummary, Summaries, TaskName
from app.engine.task import HeavyTask, LightTask

RANGE = 10_000  # values are from 0 to below it
BINS = 10
REPORT = 500  # rows


def values(seed: int, first: int, last: int) -> Iterator[int]:
    """The values of rows `first` to `last` (not included), one at a time, always the same for the same seed."""
    for row in range(first, last):
        yield (row * 7_919 + seed * 104_729 + row * row % 9_973) % RANGE


@celery.task(
    name=TaskName.SUMMARISE_CHUNK,
    base=HeavyTask,
    bind=True,
    pydantic=True,
    overall_rate=50,  # chunks a second that whatever holds the rows can stand
)
def summarise_chunk(self: HeavyTask, payload: Chunk) -> dict[str, object]:
    """Count, sum, least, greatest and histogram of a chunk, in memory for one row."""
    count = total = 0
    least, greatest = RANGE, -1
    histogram = [0] * BINS
    for value in values(payload.seed, payload.first, payload.last):
        count += 1
        total += value
        least, greatest = min(least, value), max(greatest, value)
        histogram[value * BINS // RANGE] += 1
        if count % REPORT == 0:
            self.progress(count, payload.last - payload.first)
    return {"count": count, "sum": total, "min": least, "max": greatest, "histogram": histogram}


@celery.task(name=TaskName.AGGREGATE, base=LightTask, pydantic=True)
def aggregate(payload: Summaries) -> dict[str, object]:
    """The summary of all chunks, and the mean."""
    chunks: list[ChunkSummary] = payload.chunks
    count, total = sum(one.count for one in chunks), sum(one.sum for one in chunks)
    return {
        "chunks": len(chunks),
        "count": count,
        "sum": total,
        "mean": round(total / count, 3),
        "min": min(one.min for one in chunks),
        "max": max(one.max for one in chunks),
        "histogram": [sum(column) for column in zip(*(one.histogram for one in chunks), strict=True)],
    }
