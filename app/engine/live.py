"""Live updates: what becomes of a task, told at once to all in this process who wait for it.

Each change of a record is announced on the channel of the record's name. One connection listens for all watchers,
one loop reads the records that have changed, and every watcher of a task is handed the same `Update`. A notice only
says that there is something to read: one that is lost makes an update late, by a heartbeat at most.
"""

import asyncio
from types import TracebackType
from typing import Any, Protocol, Self

import structlog
from pymongo.errors import PyMongoError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from app import problems
from app.engine.loops import end, forever
from app.engine.record import FINAL, document, record_key
from app.engine.state import AsyncTaskStore
from app.models import TaskStatus

log = structlog.get_logger(__name__)

BATCH = 50  # records that are read at once: with their payloads and results each may hold 320 KiB
LARGE_MAX = 32  # large updates that are handed on at a time: the end of one task may be copied for a thousand watchers
PAUSE = 1  # seconds, and up to half as many again, after something has failed


class Archived(Protocol):
    """Where tasks are whose record has left Redis: `database.TaskResultRepository`."""

    async def get(self, task_id: str) -> dict[str, Any] | None:
        """The status document of a task, or None."""


class Update:
    """A task at one version: its status document, shared by all who are told of it.

    `id` names the version, `epoch.version`. A final one says so in its id: Redis may lose a record after a crash, and
    the one that is made again counts from the start; the end of a task is never taken for something else.
    """

    __slots__ = ("_json", "document", "final", "id", "round")

    def __init__(self, document: dict[str, Any], *, number: int = 0) -> None:
        self.document = document
        self.final = document["status"] in FINAL
        self.id = f"{document['epoch']}.{document['version']}{'-final' if self.final else ''}"
        self.round = number
        self._json: bytes | None = None

    def json(self) -> bytes:
        """The document as clients see it, byte for byte the answer to a status request; made once."""
        if self._json is None:
            self._json = TaskStatus.model_validate(self.document).model_dump_json().encode()
        return self._json


class _Topic:
    """A task that is watched: the latest that was read of it, and who watches it."""

    __slots__ = ("gone_since", "task_id", "update", "watches")

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id
        self.watches: set[Watch] = set()
        self.update: Update | None = None
        self.gone_since: float | None = None

    def wake(self) -> None:
        for watch in self.watches:
            watch.wake()


class Watch:
    """One who waits for a task, with room for one update: whoever is slow is told the latest, not all.

    A context manager; the place among the watchers is free again at its end. `seen` is the id of an update that is
    not to be told again.
    """

    __slots__ = ("_channel", "_closed", "_live", "_since", "_topic", "_waiter", "seen")

    def __init__(self, live: "Live", topic: _Topic, channel: str, since: int, seen: str) -> None:
        self._live = live
        self._topic = topic
        self._channel = channel
        self._since = since
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False
        self.seen = seen

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.leave(self, self._channel)

    @property
    def over(self) -> bool:
        """Whether nothing more is to be waited for: it was closed, the process stops, or the task is gone."""
        return self._closed or self._live.draining or self._live.forgotten(self._topic.gone_since)

    def close(self) -> None:
        """End the wait, from another task."""
        self._closed = True
        self.wake()

    def wake(self) -> None:
        """Let `next` look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self, seconds: float) -> Update | None:
        """The latest update that was not told yet, as soon as there is one; None after `seconds`, or if it is over."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while True:
            update = self._topic.update
            # What was read before this watch began may be older than what its client has seen.
            if update is not None and update.round > self._since and update.id != self.seen:
                self.seen = update.id
                return update
            if self.over or loop.time() >= deadline:
                return None
            self._waiter = loop.create_future()
            timer = loop.call_at(deadline, self.wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None


class Live:
    """All watches of this process, at most `limit`, over one pub/sub connection that is opened for the first of them.

    A context manager, whose loops run until its end. `heartbeat` is the number of seconds after which every watched
    record is read again and the connection has to show that it lives.
    """

    def __init__(self, store: AsyncTaskStore, results: Archived, *, limit: int, heartbeat: float) -> None:
        self._store = store
        self._results = results
        self._limit = limit
        self.heartbeat = heartbeat
        self.draining = False
        self.readable = True  # whether the last attempt to read records has succeeded
        self.watches = 0
        self.large = asyncio.Semaphore(LARGE_MAX)  # held by who hands on a large update
        self._topics: dict[str, _Topic] = {}  # by channel
        self._subscribed: set[str] = set()  # channels of which Redis has said so
        self._dirty: dict[str, None] = {}  # channels whose record is to be read, in order
        self._due = asyncio.Event()
        self._wanted = asyncio.Event()  # the set of topics has changed
        self._round = 0
        self._loops: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        errors = (RedisError, PyMongoError, OSError)
        works = (self._listen, self._read, self._beat)
        self._loops = [asyncio.create_task(forever(work, "live updates", errors)) for work in works]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.drain()
        await end(self._loops)

    def watch(self, task_id: str, seen: str = "") -> Watch:
        """Watch a task of whose existence the caller knows; every change from now on is told.

        Raises `WatchersFull` (a problem) past the limit.
        """
        if self.watches >= self._limit:
            raise problems.WatchersFull
        channel = record_key(task_id)
        topic = self._topics.get(channel)
        if topic is None:
            topic = self._topics[channel] = _Topic(task_id)
            self._wanted.set()
        watch = Watch(self, topic, channel, self._round, seen)
        topic.watches.add(watch)
        self.watches += 1
        # The record is read after the channel is subscribed, never before: a change in between would be lost. For a
        # new channel Redis's confirmation sets that off.
        if channel in self._subscribed:
            self._mark(channel)
        return watch

    def leave(self, watch: Watch, channel: str) -> None:
        """Forget a watch, and its task after the last one."""
        topic = self._topics[channel]
        topic.watches.discard(watch)
        self.watches -= 1
        if not topic.watches:
            del self._topics[channel]
            self._wanted.set()

    def drain(self) -> None:
        """Let all waits end now, and new ones at once: the process is told to stop. May be called again."""
        if not self.draining:
            self.draining = True
            for topic in self._topics.values():
                topic.wake()

    def forgotten(self, gone_since: float | None) -> bool:
        """Whether a task that was neither in Redis nor in the archive then will not come back.

        A worker makes a record again that Redis has lost; that is waited for.
        """
        return gone_since is not None and asyncio.get_running_loop().time() - gone_since > self.heartbeat

    def _mark(self, *channels: str) -> None:
        for channel in channels:
            if channel in self._topics:
                self._dirty[channel] = None
                self._due.set()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.heartbeat)
            self._mark(*self._topics)

    async def _listen(self) -> None:
        """Open the connection when somebody watches, and serve it until it fails. Raises `RedisError`."""
        while not self._topics:
            self._wanted.clear()
            await self._wanted.wait()
        pool: Any = self._store.redis.connection_pool
        connection = pool.make_connection()  # beside the pool, whose connections are for requests
        both: list[asyncio.Task[None]] = []
        try:
            await connection.connect()
            both = [asyncio.create_task(self._ask(connection)), asyncio.create_task(self._hear(connection))]
            done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._subscribed.clear()
            try:
                await end(both)
            finally:
                await connection.disconnect()

    async def _ask(self, connection: Any) -> None:
        """Subscribe to what is watched and to nothing else; ask for a sign of life at each heartbeat."""
        asked: set[str] = set()
        while True:
            self._wanted.clear()
            wanted = set(self._topics)
            changes = {"SUBSCRIBE": wanted - asked, "UNSUBSCRIBE": asked - wanted}
            self._subscribed -= changes["UNSUBSCRIBE"]
            for command, channels in changes.items():
                if channels:
                    await connection.send_command(command, *channels, check_health=False)
            asked = wanted
            try:
                async with asyncio.timeout(self.heartbeat):
                    await self._wanted.wait()
            except TimeoutError:
                await connection.send_command("PING", check_health=False)

    async def _hear(self, connection: Any) -> None:
        while True:
            answer = await connection.read_response(timeout=2 * self.heartbeat, disconnect_on_error=False)
            match answer:
                case None:
                    raise RedisConnectionError("the pub/sub connection gives no sign of life")
                case ["subscribe", str(channel), _]:
                    self._subscribed.add(channel)
                    self._mark(channel)
                case ["unsubscribe", str(channel), _]:
                    self._subscribed.discard(channel)
                case ["message", str(channel), _]:
                    self._mark(channel)

    async def _read(self) -> None:
        """Read what has changed, many records at once, and tell their watchers. Raises `RedisError`, `PyMongoError`."""
        while True:
            await self._due.wait()
            channels = [channel for channel in self._dirty if channel in self._topics][:BATCH]
            if not channels:
                self._dirty.clear()
                self._due.clear()
                continue
            for channel in channels:
                del self._dirty[channel]
            try:
                await self._tell([self._topics[channel] for channel in channels])
            except (RedisError, PyMongoError):
                self.readable = False
                self._mark(*channels)
                raise
            self.readable = True

    async def _tell(self, topics: list[_Topic]) -> None:
        self._round += 1
        number = self._round
        records = await self._store.records([topic.task_id for topic in topics])
        gone = [topic for topic, record in zip(topics, records, strict=True) if not record]
        for topic, record in zip(topics, records, strict=True):
            if record and (found := _document(topic.task_id, record)):
                _renew(topic, found, number)
        for topic in gone:
            archived = await self._results.get(topic.task_id)
            if archived is not None:
                _renew(topic, archived, number)
            elif topic.gone_since is None:
                topic.gone_since = asyncio.get_running_loop().time()
            else:
                topic.wake()


def _renew(topic: _Topic, document: dict[str, Any], number: int) -> None:
    topic.gone_since = None
    topic.update = Update(document, number=number)
    topic.wake()


def _document(task_id: str, record: dict[str, str]) -> dict[str, Any] | None:
    try:
        return document(task_id, record)
    except (ValueError, TypeError, KeyError, RecursionError):
        # It must not end the updates of all others; a status request tells of it.
        log.exception("a record cannot be read", task_id=task_id)
        return None
