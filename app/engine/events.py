"""Handling events: the handlers of a service, and the subscriber that brings them what waits in its queue.

At least once, in effect once: the marker that an event was handled and all that its handlers write to MongoDB are one
transaction, and the message is acknowledged after it. What a handler does elsewhere may happen again.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Self

import structlog
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, ChannelNotFoundEntity
from pymongo.errors import ConnectionFailure, OperationFailure, PyMongoError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from structlog.contextvars import bound_contextvars

from app.contracts import subscribed
from app.database import AlreadyHandledError, MarkerRepository, in_transaction
from app.engine.envelope import EnvelopeError, Event, marker_of
from app.engine.errors import PERMANENT, TaskError, error_of
from app.engine.loops import end, forever
from app.engine.publisher import REPLAY, Publisher, Refused, Unconfirmed

log = structlog.get_logger(__name__)

# Takes an event, the session to be passed to all operations on MongoDB, and the database.
Handler = Callable[[Event, Any, Any], Awaitable[None]]

GRACE = 10.0  # seconds that events in work are given when the process ends; below the stop grace period
MARGIN = 1.0  # seconds after which a handler is stopped that MongoDB's own time-out has not stopped
BACKOFF_MAX = 30.0  # seconds between two attempts
# Seconds for which a delivery waits for MongoDB before it goes to the queue's end as a new message: far below the
# consumer timeout (30 minutes), after which the broker would count it as one that came back.
PATIENCE = 600.0
WRITE_CONFLICT = 112  # MongoDB's error code

Verdict = Literal["done", "again", "dead"]


class TooSlowError(TaskError):
    """The handlers of an event took too long."""

    kind = "time_limit_exceeded"


class Handlers:
    """The handlers of a service, by the patterns of topic exchanges: `on = Handlers()`, then `@on("user.*")`."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, Handler]] = []

    def __call__(self, pattern: str) -> Callable[[Handler], Handler]:
        """The decorator of a handler: an `async def (event, session, database)`."""

        def register(handler: Handler) -> Handler:
            self._rows.append((pattern, handler))
            return handler

        return register

    def of(self, event_type: str) -> list[Handler]:
        """Those that want an event, in the order in which they were registered."""
        return [handler for pattern, handler in self._rows if subscribed(pattern, event_type)]


class Subscriber:
    """Works at the events of one service, as long as it is entered: `async with Subscriber(…): …`.

    At most `prefetch` at a time, each for `timeout` seconds in MongoDB and its handlers together. Any number of these
    may run, in any processes.
    """

    def __init__(  # noqa: PLR0913  it stands between all of them
        self,
        service: str,
        on: Handlers,
        publisher: Publisher,
        markers: MarkerRepository,
        database: Any,
        *,
        prefetch: int,
        timeout: float,
        backoff_max: float = BACKOFF_MAX,
        patience: float = PATIENCE,
    ) -> None:
        self._service = service
        self._queue = f"events.{service}"
        self._on = on
        self._publisher = publisher
        self._markers = markers
        self._database = database
        self._prefetch = prefetch
        self._timeout = timeout
        self._backoff_max = backoff_max
        self._patience = patience
        self._stop = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self._work: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Begin; servers that are away are waited for."""
        errors = (Refused, TimeoutError, OSError, *CONNECTION_EXCEPTIONS)
        self._work = asyncio.create_task(forever(self._consume, f"events of {self._service}", errors))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take no more, and give what is in work `GRACE` seconds. The rest goes back to the queue."""
        self._stop.set()
        clock = asyncio.get_running_loop().time
        deadline = clock() + GRACE
        while self._running and clock() < deadline:
            await asyncio.wait(self._running, timeout=deadline - clock())
        if self._work is not None:
            await end([self._work])

    async def _consume(self) -> None:
        """Work until the connection is lost, or the queue is."""
        async with self._publisher.channel() as channel:
            try:
                await self._take(channel)
            except ChannelNotFoundEntity:
                log.warning("a queue of events is gone and made again", queue=self._queue)
                await self._publisher.declare()
            finally:
                # Without their channel they can settle nothing: the broker gives their events to somebody else.
                await end(self._running)

    async def _take(self, channel: AbstractChannel) -> None:
        async def start(message: AbstractIncomingMessage) -> None:
            task = asyncio.create_task(self._deliver(message))
            self._running.add(task)
            task.add_done_callback(self._done)

        gone = asyncio.Event()
        (await channel.get_underlay_channel()).on_consumer_cancel_callbacks.add(lambda _: gone.set())
        await channel.set_qos(prefetch_count=self._prefetch)
        queue = await channel.get_queue(self._queue, ensure=False)
        tag = await queue.consume(start)
        log.info("waiting for events", queue=self._queue)
        signs = [asyncio.ensure_future(sign) for sign in (channel.closed(), gone.wait(), self._stop.wait())]
        try:
            await asyncio.wait(signs, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end(signs)
        if self._stop.is_set() and not channel.is_closed:
            await queue.cancel(tag)
            await channel.closed()  # those in work have it until `__aexit__` ends this

    def _done(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("an event was not settled, and will come again", exc_info=error)

    async def _deliver(self, message: AbstractIncomingMessage) -> None:
        """Settle one delivery; what goes wrong with that is settled by the next one."""
        try:
            event = Event.parse(message.body)
        except EnvelopeError as error:
            log.error("an event that cannot be read was dead-lettered", queue=self._queue, fault=str(error))  # noqa: TRY400
            await self._settle(message, "dead")
            return
        with bound_contextvars(event_id=event.id, event_type=event.type):
            await self._settle(message, await self._patiently(event, message))

    async def _settle(self, message: AbstractIncomingMessage, verdict: Verdict) -> None:
        try:
            if verdict == "done":
                await message.ack()
            else:
                # Rejected rather than returned: every version of RabbitMQ counts that as a delivery.
                await message.reject(requeue=verdict == "again")
        except (*CONNECTION_EXCEPTIONS, OSError) as error:
            log.warning("an event was not settled, and will come again", error=type(error).__name__)

    async def _patiently(self, event: Event, message: AbstractIncomingMessage) -> Verdict:
        """Handle an event however long the servers are away: that is no attempt, and the broker must count none."""
        clock = asyncio.get_running_loop().time
        began, attempts = clock(), 0
        while True:
            try:
                return await self._attempt(event)
            except Exception as error:
                if not await self._away(error):
                    # A mistake of ours must not keep the event, and a place in the prefetch, for ever.
                    log.exception("an event cannot be handled")
                    await self._rest(self._backoff_max)
                    return "again"
                log.warning("an event waits for a server", error=f"{type(error).__name__}: {error}")
            attempts += 1
            await self._rest(self._pause(attempts))
            if self._stop.is_set():
                return "again"
            if clock() - began > self._patience:
                with suppress(Refused, Unconfirmed):
                    replay = str(message.headers.get(REPLAY, ""))
                    await self._publisher.emit(event.document(), queue=self._queue, replay=replay)
                    return "done"

    async def _attempt(self, event: Event) -> Verdict:
        marker = marker_of(self._service, event)
        handlers = self._on.of(event.type)
        if not handlers:
            return "done"

        async def effects(session: Any) -> None:
            await self._markers.mark(marker, session=session)
            # What it writes ends in time by itself; this is for what else it may wait for.
            async with asyncio.timeout(self._timeout + MARGIN):
                for handler in handlers:
                    await handler(event, session, self._database)

        try:
            await in_transaction(self._database, effects, seconds=self._timeout)
        except AlreadyHandledError:
            log.info("an event came again")
            return "done"
        except TimeoutError:
            return await self._failed(marker, TooSlowError(f"The handlers took longer than {self._timeout} s."))
        except Exception as error:
            if await self._away(error):
                raise
            return await self._failed(marker, error)
        return "done"

    async def _failed(self, marker: str, error: Exception) -> Verdict:
        """Note a failed attempt, and wait before the broker is to bring the event again."""
        permanent = isinstance(error, PERMANENT)
        log.warning("a handler failed", permanent=permanent, exc_info=error)
        try:
            attempts = await self._markers.failed(
                marker, error_of(error), reason="permanent" if permanent else "exhausted"
            )
        except AlreadyHandledError:  # by another delivery, meanwhile
            return "done"
        if permanent:
            return "dead"
        await self._rest(self._pause(attempts))
        return "again"

    async def _rest(self, seconds: float) -> None:
        # A process that is told to stop waits for nothing.
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    def _pause(self, attempts: int) -> float:
        longest = min(self._backoff_max, 2.0 ** min(attempts, 30))
        return longest * random.uniform(0.5, 1)  # noqa: S311  not for secrets

    async def _away(self, error: Exception) -> bool:
        """Whether an error says that a server is away, which is not the handler's fault."""
        if not isinstance(error, PyMongoError):
            return isinstance(error, (RedisConnectionError, RedisTimeoutError, Refused, Unconfirmed))
        if error.timeout:
            # MongoDB was slow, or the handler has left it no time.
            try:
                await self._database.command("ping")
            except PyMongoError:
                return True
            return False
        if isinstance(error, OperationFailure) and error.code == WRITE_CONFLICT:
            # With what a process has left open that died: MongoDB ends that after a while.
            return True
        return isinstance(error, ConnectionFailure) or error.has_error_label("TransientTransactionError")
