"""The relay: events that were written with the change they tell of go from MongoDB to RabbitMQ.

At least once and under the same id: two relays, or one that died between the confirm and the note of it, publish the
same event twice, and each subscriber's marker lets it have one effect.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import orjson
from pymongo.errors import PyMongoError

from app.database import OutboxRepository
from app.engine.envelope import document, moment
from app.engine.loops import forever
from app.engine.publisher import Publisher, Refused, Unconfirmed


def envelope_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The envelope of the event that a row of the outbox tells of; a newer process may have written it."""
    return document(
        event_id=str(row["_id"]),
        kind=row["type"],
        source=row["source"],
        time=moment(row["time"]),
        version=row["dataversion"],
        data=orjson.loads(row["data"]),
    )


class Relay:
    """Looks for waiting rows every `interval` seconds and publishes up to `batch` of them, oldest first."""

    def __init__(self, outbox: OutboxRepository, publisher: Publisher, *, interval: float, batch: int) -> None:
        self._outbox = outbox
        self._publisher = publisher
        self._interval = interval
        self._batch = batch

    async def run(self) -> None:
        """Relay until cancelled; servers that are away are waited for."""
        await forever(self._turn, "outbox", (PyMongoError, Refused, Unconfirmed))

    async def _turn(self) -> None:
        if await self.round() < self._batch:
            await asyncio.sleep(self._interval)

    async def round(self) -> int:
        """Publish what waits, at most a batch; answers how many rows.

        Raises what the broker or MongoDB said, after all that was published has been noted. What is left comes again.
        """
        rows = await self._outbox.waiting(self._batch)
        if not rows:
            return 0
        outcomes = await asyncio.gather(*(self._publish(row) for row in rows))
        done = [row["_id"] for row, error in zip(rows, outcomes, strict=True) if error is None]
        if done:
            await self._outbox.published(done)
        errors = [error for error in outcomes if error is not None]
        if errors:
            raise errors[0]
        return len(rows)

    async def _publish(self, row: Mapping[str, Any]) -> Refused | Unconfirmed | None:
        try:
            await self._publisher.emit(envelope_of(row))
        except (Refused, Unconfirmed) as error:
            return error
        return None
