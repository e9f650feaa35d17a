"""A data set in chunks: each is summarised by a task of its own, and one task aggregates the summaries.

Rows never travel: a task is told which ones to read, and answers some numbers.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from app.contracts import Chunk, ChunkSummary, Dataset, Payload, Summaries, TaskName
from app.engine.workflows import Definition, Results, Step, chord


def steps(request: Dataset) -> Sequence[Step]:
    """A member a chunk, and the one that aggregates."""
    firsts = range(0, request.rows, request.chunk)
    names = [f"chunk-{number:03}" for number in range(len(firsts))]
    chunks = [
        Step(name, TaskName.SUMMARISE_CHUNK, partial(_chunk, request, first))
        for name, first in zip(names, firsts, strict=True)
    ]

    def summaries(results: Results) -> Summaries:
        return Summaries(chunks=[ChunkSummary(**results[name]) for name in names])

    return chord(chunks, Step("aggregate", TaskName.AGGREGATE, summaries))


def _chunk(request: Dataset, first: int, _results: Results) -> Payload:
    return Chunk(seed=request.seed, first=first, last=min(first + request.chunk, request.rows))


def outcome(results: Results) -> Any:
    """What the aggregate says."""
    return results["aggregate"]


DEFINITION = Definition("dataset", Dataset, steps, outcome)
