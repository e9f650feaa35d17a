"""Publishing tasks to RabbitMQ from asyncio: confirmed, mandatory, persistent, bounded in time.

The API does not publish through Celery, whose producer would block the event loop; the messages are the ones that
Celery's workers expect (task protocol 2).
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

import aio_pika
import orjson
import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, DeliveryError

from app.contracts import SUBSCRIPTIONS, subscribed
from app.engine.message import RECORD, Message, record_header
from app.engine.queues import BROKER_ERRORS, EVENTS, TASKS

log = structlog.get_logger(__name__)

BURST = 50  # messages that are encoded before other requests have their turn
CONTROL = "celery.pidbox"  # where Celery's workers listen for orders
REPLAY = "x-replay"  # header: of which dead letter an event is the replay
EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


class Refused(Exception):  # noqa: N818
    """The broker has certainly not taken the message: it is away, returned it, or said no."""


class Unconfirmed(Exception):  # noqa: N818
    """Whether the broker has taken the message is not known: no answer in time, or the connection was lost."""


def envelope(message: Message) -> aio_pika.Message:
    """The AMQP message of a task, as `app.amqp.as_task_v2` of Celery 5 would make it (task protocol 2)."""
    headers: dict[str, Any] = {
        "lang": "py",
        "task": message.name,
        "id": message.task_id,
        "root_id": message.task_id,
        "parent_id": None,
        "shadow": None,
        "group": None,
        "group_index": None,
        "eta": None,
        "expires": None,
        "retries": message.retries,
        "timelimit": [None, None],
        # Arguments stay out of logs and events.
        "argsrepr": "()",
        "kwargsrepr": "{...}",
        "origin": "api",
        "ignore_result": False,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
        RECORD: record_header(message),
    }
    return aio_pika.Message(
        orjson.dumps([[], {"payload": message.payload}, EMBED]),
        headers=headers,
        content_type="application/json",
        content_encoding="utf-8",
        correlation_id=message.task_id,
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        reply_to="",
    )


class Publisher:
    """One connection and one channel to the broker, opened when needed and again after a loss.

    `declare` is called (in a thread) before each connection is used, so that a broker that lost everything is set up
    again. `timeout`, in seconds, bounds a publish with all that it waits for.
    """

    def __init__(self, url: str, *, name: str, timeout: float, declare: Callable[[], None]) -> None:
        self._url = url
        self._name = name
        self._timeout = timeout
        self._declare = declare
        self._connection: AbstractConnection | None = None
        self._channel: AbstractChannel | None = None
        self._exchange: AbstractExchange | None = None
        # Of their own, so that what goes wrong with an event closes no channel under a task.
        self._events: AbstractChannel | None = None
        self._connecting: asyncio.Task[AbstractExchange] | None = None
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        """Connect; a broker that is away is no reason not to start."""
        # Waited for all the same: to declare takes a thread's time away from whom is served already.
        await asyncio.wait([self._start_connecting()], timeout=self._timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting], timeout=self._timeout)
        await self._drop()

    async def publish(self, message: Message) -> None:
        """Publish `message` to its queue and wait until the broker has it on disk.

        Raises `Refused` when it certainly is not queued, `Unconfirmed` when nobody can say.
        """
        (error,) = await self.publish_many([message])
        if error is not None:
            raise error

    async def publish_many(self, messages: Sequence[Message]) -> list[Refused | Unconfirmed | None]:
        """Publish `messages` and wait for all confirms together, no longer than for one.

        Answers a row a message: None, or what `publish` would raise. One that fails keeps back no other.
        """
        try:
            exchange = await self._connected()
        except Refused as error:
            return [Refused(str(error)) for _ in messages]
        deadline = asyncio.get_running_loop().time() + self._timeout
        if len(messages) == 1:
            return [await self._outcome(exchange, messages[0], deadline)]
        sending = []
        for begin in range(0, len(messages), BURST):
            burst = messages[begin : begin + BURST]
            sending += [asyncio.create_task(self._outcome(exchange, message, deadline)) for message in burst]
            await asyncio.sleep(0)
        return await asyncio.gather(*sending)

    async def _outcome(
        self, exchange: AbstractExchange, message: Message, deadline: float
    ) -> Refused | Unconfirmed | None:
        left = deadline - asyncio.get_running_loop().time()
        try:
            await self._send(exchange, envelope(message), message.queue, mandatory=True, timeout=left)
        except (Refused, Unconfirmed) as error:
            return error
        except Exception as error:
            # A defect of ours: it must not keep the others from their answers.
            log.exception("publishing failed", task_id=message.task_id)
            return Unconfirmed(f"{type(error).__name__}: {error}")
        return None

    async def _send(
        self,
        exchange: AbstractExchange,
        message: aio_pika.Message,
        routing_key: str,
        *,
        mandatory: bool,
        timeout: float,  # noqa: ASYNC109
    ) -> None:
        try:
            await exchange.publish(message, routing_key=routing_key, mandatory=mandatory, timeout=timeout)
        except DeliveryError as error:
            raise Refused(f"the broker refused the message: {type(error).__name__}") from error
        except (TimeoutError, *CONNECTION_EXCEPTIONS, OSError, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and _cancelled_from_outside():
                raise
            raise Unconfirmed(f"no confirm from the broker: {type(error).__name__}") from error

    async def emit(self, event: Mapping[str, Any], *, queue: str | None = None, replay: str = "") -> None:
        """Publish a CloudEvents 1.0 document to the exchange `events`, its type being the routing key.

        Nobody may listen, except where the contracts say that somebody does. With `queue` it goes to that one queue
        alone, as `replay` of what had been dead-lettered there. Raises as `publish` does.
        """
        message = aio_pika.Message(
            orjson.dumps(event),
            content_type="application/cloudevents+json",
            message_id=event["id"],
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            headers={REPLAY: replay} if replay else {},
        )
        await self._connected()
        assert self._events is not None  # noqa: S101
        if queue is not None:
            exchange, key, heard = self._events.default_exchange, queue, True
        else:
            exchange, key = await self._events.get_exchange(EVENTS.name, ensure=False), event["type"]
            heard = any(subscribed(pattern, key) for patterns in SUBSCRIPTIONS.values() for pattern in patterns)
        await self._send(exchange, message, key, mandatory=heard, timeout=self._timeout)

    async def broadcast(self, method: str, arguments: Mapping[str, Any]) -> None:
        """Give all workers an order (Celery's remote control); none may hear it. Raises as `publish` does."""
        order = {"method": method, "arguments": arguments, "destination": None, "pattern": None, "matcher": None}
        message = aio_pika.Message(
            orjson.dumps(order), content_type="application/json", content_encoding="utf-8", headers={"expires": None}
        )
        async with self.channel() as channel:
            exchange = await channel.declare_exchange(CONTROL, "fanout", durable=False)
            await self._send(exchange, message, "", mandatory=False, timeout=self._timeout)

    async def declare(self) -> None:
        """Declare all exchanges and queues again, one of which is gone. Raises `Refused` when the broker is away."""
        try:
            await asyncio.to_thread(self._declare)
        except BROKER_ERRORS as error:
            raise Refused(f"queues not declared: {type(error).__name__}: {error}") from error

    async def depths(self, queues: Iterable[str]) -> dict[str, int]:
        """How many messages are ready in each queue. Raises `Refused` when the broker cannot say."""
        async with self.channel() as channel:
            found = {}
            for name in queues:
                queue = await channel.declare_queue(name, passive=True, timeout=self._timeout)
                found[name] = queue.declaration_result.message_count or 0
            return found

    async def ping(self) -> None:
        """Ask the broker for a sign of life. Raises `Refused` when it is away; bound the wait yourself."""
        async with self.channel():
            pass

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[AbstractChannel]:
        """A channel of one's own on this connection, with confirms. Raises `Refused` when the broker is away."""
        try:
            await self._connected()
            assert self._connection is not None  # noqa: S101
            channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
            try:
                yield channel
            finally:
                if not channel.is_closed:
                    await _close_within(channel.close, self._timeout)
        except (TimeoutError, *CONNECTION_EXCEPTIONS, OSError) as error:
            raise Refused(f"the broker does not answer: {type(error).__name__}: {error}") from error

    async def _connected(self) -> AbstractExchange:
        """The exchange of tasks, over a connection that stands. Raises `Refused` where there is none in time."""
        channel = self._channel
        if self._exchange is not None and channel is not None and not channel.is_closed:
            return self._exchange
        try:
            return await asyncio.wait_for(asyncio.shield(self._start_connecting()), self._timeout)
        except TimeoutError:
            raise Refused("no connection to the broker in time") from None
        finally:
            # Hundreds may have waited, and what they do next, all at once, held the loop for a tenth of a second.
            async with self._turn:
                await asyncio.sleep(0)

    def _start_connecting(self) -> asyncio.Task[AbstractExchange]:
        # One attempt for all that wait; it lives on when they give up.
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.create_task(self._connect())
            self._connecting.add_done_callback(_log_failure)
        return self._connecting

    async def _connect(self) -> AbstractExchange:
        await self._drop()
        try:
            await asyncio.to_thread(self._declare)
            self._connection = await aio_pika.connect(
                self._url, timeout=self._timeout, client_properties={"connection_name": self._name}
            )
            self._channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
            self._events = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
            self._exchange = await self._channel.get_exchange(TASKS.name, ensure=False)
        except (*CONNECTION_EXCEPTIONS, *BROKER_ERRORS) as error:
            raise Refused(f"no connection to the broker: {type(error).__name__}: {error}") from error
        log.info("connected to the broker")
        return self._exchange

    async def _drop(self) -> None:
        connection, self._connection, self._channel, self._exchange = self._connection, None, None, None
        self._events = None
        if connection is not None and not connection.is_closed:
            await _close_within(connection.close, self._timeout)


async def _close_within(close: Callable[[], Awaitable[None]], timeout: float) -> None:  # noqa: ASYNC109
    try:
        await asyncio.wait_for(close(), timeout)
    except (TimeoutError, *CONNECTION_EXCEPTIONS, OSError) as error:
        log.warning("broker connection did not close cleanly", error=type(error).__name__)


def _cancelled_from_outside() -> bool:
    # aiormq cancels the waiters of a connection that dies; that is a lost connection, not a cancelled caller.
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _log_failure(task: asyncio.Task[AbstractExchange]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("cannot connect to the broker", error=str(error))
