"""Publishing events for clients, and once more for operators."""

import asyncio
from collections.abc import Mapping
from typing import Any

import orjson
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app import problems
from app.contracts import EventName, Payload
from app.database import DeadLetterRepository
from app.engine.envelope import Event
from app.engine.publisher import Publisher, Refused, Unconfirmed

SOURCE = "/api/events"


class Emitter:
    """Publishes events under ids that stand for requests, so that a request seen twice is one event to who subscribes.

    An event by a client's own key leaves the digest of its body in Redis (`event:{id}`) for `key_ttl` seconds.
    """

    def __init__(self, publisher: Publisher, letters: DeadLetterRepository, redis: Redis, *, key_ttl: int) -> None:
        self._publisher = publisher
        self._letters = letters
        self._redis = redis
        self._key_ttl = key_ttl

    async def publish(
        self, kind: EventName, data: Payload, *, event_id: str, digest: str, keyed: bool
    ) -> tuple[Event, bool]:
        """Publish an event and wait until the broker has it; answers it, and whether its key was there before.

        A repeat is published again: the first may not have come so far, and subscribers know its id. Raises
        `KeyReused`, `Unavailable` (a key that cannot be looked up) and `EventNotPublished`.
        """
        event = Event.new(event_id, data, kind=kind, source=SOURCE)
        earlier = await self._earlier(event, digest) if keyed else None
        if earlier is not None:
            known, time = earlier.split(" ")
            if known != digest:
                raise problems.KeyReused
            event = Event(event.id, event.type, event.source, time, event.data)
        try:
            # Shielded: a client that goes away must not leave half a publish on the channel.
            await asyncio.shield(self._publisher.emit(event.document()))
        except (Refused, Unconfirmed) as error:
            raise problems.EventNotPublished from error
        return event, earlier is not None

    async def replay(self, letter: Mapping[str, Any], *, by: str) -> bool:
        """Give the event of a dead letter to its one queue again; False where another hand was faster.

        Two at once may both publish: they are the same event. Raises `EventNotPublished`; the letter then stays open.
        """
        if letter["state"] != "open":
            return False
        try:
            event = orjson.loads(letter["message"]["event"])
            replay = self._publisher.emit(event, queue=letter["queue"], replay=str(letter["_id"]))
            await asyncio.shield(replay)
        except (Refused, Unconfirmed) as error:
            raise problems.EventNotPublished from error
        return await self._letters.settle(letter["_id"], "replayed", by=by)

    async def _earlier(self, event: Event, digest: str) -> str | None:
        try:
            earlier: Any = await self._redis.set(
                f"event:{event.id}", f"{digest} {event.time}", nx=True, get=True, ex=self._key_ttl
            )
        except RedisError as error:
            raise problems.Unavailable(
                "Redis, which knows the keys of events, does not answer; repeat the request with the same key."
            ) from error
        return None if earlier is None else str(earlier)
