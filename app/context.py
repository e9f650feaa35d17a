"""Context: opens, names and closes every client; API, beat, workers and tests use it alike."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx
import redis as blocking
import structlog
from pymongo.errors import PyMongoError
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.retry import Retry as BlockingRetry

from app.database import (
    DeadLetterRepository,
    FireRepository,
    ItemRepository,
    JobRepository,
    KeyRepository,
    MarkerRepository,
    OutboxRepository,
    ScheduleRepository,
    TaskResultRepository,
    WorkflowRepository,
    create_client,
    create_worker_client,
    ensure_indexes,
)
from app.engine.archive import Archive
from app.engine.conductor import Conductor
from app.engine.dead_letters import DeadLetters
from app.engine.emitter import Emitter
from app.engine.events import Handlers, Subscriber
from app.engine.jobs import Jobs
from app.engine.keys import KeyRing
from app.engine.live import Live
from app.engine.outbox import Relay
from app.engine.publisher import Publisher, Refused
from app.engine.queues import declare
from app.engine.quotas import Quotas
from app.engine.reconciler import Reconciler
from app.engine.schedules import Schedules
from app.engine.service import TaskService
from app.engine.state import AsyncTaskStore
from app.engine.workflow_service import WorkflowService
from app.settings import Settings, get_settings
from app.workflows import load

log = structlog.get_logger(__name__)

INDEX_PAUSE = 2  # seconds between attempts to create indexes


@dataclass(frozen=True, slots=True)
class Context:
    """All that a handler or a loop may need, opened and ready to use."""

    settings: Settings
    items: ItemRepository
    results: TaskResultRepository
    letters: DeadLetterRepository
    tasks: TaskService
    store: AsyncTaskStore
    workflows: WorkflowService
    conductor: Conductor
    keys: KeyRing
    quotas: Quotas
    events: Emitter
    markers: MarkerRepository
    outbox: OutboxRepository
    publisher: Publisher
    database: Any
    redis: Redis
    jobs: Jobs
    schedules: ScheduleRepository
    fires: FireRepository

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        """What beat runs over this context's clients."""
        settings = self.settings
        archive = Archive(
            self.store,
            self.results,
            self.letters,
            self.publisher,
            reader=socket.gethostname(),
            batch=settings.archive_batch,
            followers=[self.conductor.follow, self.jobs.follow],
        )
        dead_letters = DeadLetters(
            self.store,
            self.results,
            self.letters,
            self.publisher,
            self.markers,
            delivery_limit=settings.queue_delivery_limit,
        )
        relay = Relay(self.outbox, self.publisher, interval=settings.outbox_interval, batch=settings.outbox_batch)
        reconciler = Reconciler(self.store, self.publisher, self.results, settings, lease=self.tasks.lease)
        schedules = Schedules(self.schedules, self.fires, self.tasks, settings)
        return [loop.run() for loop in (archive, dead_letters, reconciler, self.conductor, relay, schedules)]

    def live(self) -> Live:
        """Live updates over this context's clients, to be entered once a process."""
        settings = self.settings
        return Live(self.store, self.results, limit=settings.watchers_max, heartbeat=settings.stream_heartbeat)

    def subscriber(self, service: str, on: Handlers, **options: float) -> Subscriber:
        """What brings a service's events to its handlers while it is entered; `options` are those of `Subscriber`."""
        settings = self.settings
        limits: dict[str, Any] = {
            "prefetch": settings.event_prefetch,
            "timeout": settings.event_handler_timeout,
            **options,
        }
        return Subscriber(service, on, self.publisher, self.markers, self.database, **limits)

    async def replay(self, letter: Mapping[str, Any], *, by: str) -> bool:
        """Replay a dead letter, of a task or of an event; False where another hand was faster.

        Raises as `TaskService.replay` and `Emitter.replay` do.
        """
        return await (self.events if letter.get("event_id") else self.workflows).replay(letter, by=by)

    async def services(self) -> dict[str, bool]:
        """Which of the three servers answer within HEALTH_TIMEOUT."""
        probes: dict[str, Awaitable[Any]] = {
            "mongodb": self.database.command("ping"),
            "redis": self.redis.ping(),
            "rabbitmq": self.publisher.ping(),
        }
        answers = await asyncio.gather(*(self._answers(probe) for probe in probes.values()))
        return dict(zip(probes, answers, strict=True))

    async def _answers(self, probe: Awaitable[Any]) -> bool:
        try:
            await asyncio.wait_for(probe, self.settings.health_timeout)
        except (TimeoutError, PyMongoError, RedisError, Refused, OSError):
            return False
        return True


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """The clients of a process that runs tasks, which has no event loop. Each connects at its first call."""

    settings: Settings
    database: Any
    redis: blocking.Redis
    http: httpx.Client


@cache
def worker_context() -> WorkerContext:
    """The clients of the calling process, opened by its first task, after the fork that no client would survive."""
    settings = get_settings()
    name = f"worker-{socket.gethostname()}-{os.getpid()}"
    return WorkerContext(
        settings=settings,
        database=create_worker_client(settings, name=name)[settings.mongodb_database],
        redis=blocking.Redis.from_url(
            settings.redis_url.get_secret_value(),
            client_name=name,
            decode_responses=True,
            max_connections=2,
            socket_timeout=settings.redis_timeout,
            socket_connect_timeout=settings.redis_timeout,
            health_check_interval=25,
            # A time-out is not repeated: a task's own time is limited.
            retry=BlockingRetry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
        ),
        http=httpx.Client(
            timeout=settings.outside_timeout,
            limits=httpx.Limits(max_connections=2, max_keepalive_connections=2),
            follow_redirects=False,
            trust_env=False,
        ),
    )


@asynccontextmanager
async def open_context(settings: Settings, *, service: str) -> AsyncIterator[Context]:
    """A context whose clients carry the name of `service` in each server's list of connections.

    Servers may be away: nothing here waits for them, except that indexes are tried for first.
    """
    name = f"{service}-{socket.gethostname()}-{os.getpid()}"
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(open_database(settings, name=name))
        redis = _redis(settings, name)
        stack.push_async_callback(redis.aclose, close_connection_pool=True)
        publisher = await stack.enter_async_context(
            Publisher(
                settings.rabbitmq_url.get_secret_value(),
                name=name,
                timeout=settings.publish_timeout,
                declare=lambda: declare(settings),
            )
        )
        store = AsyncTaskStore(
            redis,
            queue_max=settings.queue_max_length,
            backlog_max=settings.archive_backlog_max,
            result_ttl=settings.result_ttl,
            look_after=settings.reconcile_after,
        )
        await _prepare(database, stack, wait=settings.mongodb_timeout)
        results = TaskResultRepository(database, retention_days=settings.archive_retention_days)
        letters = DeadLetterRepository(database, retention_days=settings.dead_letter_retention_days)
        tasks = TaskService(store, publisher, results, letters, settings)
        workflows = WorkflowRepository(database, retention_days=settings.archive_retention_days)
        conductor = Conductor(
            workflows, tasks, store, results, definitions=load(settings.workflow_modules), settings=settings
        )
        stack.push_async_callback(conductor.aclose)
        jobs = JobRepository(database, retention_days=settings.job_retention_days)
        yield Context(
            settings=settings,
            items=ItemRepository(database, identity_ttl=settings.item_identity_ttl, timeout=settings.mongodb_timeout),
            results=results,
            letters=letters,
            tasks=tasks,
            workflows=WorkflowService(workflows, tasks, store, conductor, limit=settings.workflows_max),
            conductor=conductor,
            store=store,
            keys=KeyRing(KeyRepository(database), cache=settings.api_keys_cache, grace=settings.api_keys_grace),
            quotas=Quotas(redis, timeout=settings.quota_timeout),
            events=Emitter(publisher, letters, redis, key_ttl=settings.event_key_ttl),
            markers=MarkerRepository(database, days=settings.event_marker_days),
            outbox=OutboxRepository(database, ttl=settings.outbox_ttl),
            publisher=publisher,
            database=database,
            redis=redis,
            jobs=Jobs(tasks, store, jobs, timeout=settings.archive_lookup_timeout),
            schedules=ScheduleRepository(database, identity_ttl=settings.item_identity_ttl),
            fires=FireRepository(database, retention_days=settings.fire_retention_days),
        )


@asynccontextmanager
async def open_database(settings: Settings, *, name: str) -> AsyncIterator[Any]:
    """The database alone, for commands that need no other server; `name` stands in MongoDB's list of connections."""
    client = create_client(settings, name=name)
    try:
        yield client[settings.mongodb_database]
    finally:
        # PyMongo's close is awaited, Motor's is not.
        closing = client.close()
        if closing is not None:
            await closing


def _redis(settings: Settings, name: str) -> Redis:
    # A pool's connections all die with the server; a call that meets a dead one is repeated on a new one. That is safe
    # since each script answers a repeat of the same call like the first. A time-out is not repeated.
    pool = BlockingConnectionPool.from_url(
        settings.redis_url.get_secret_value(),
        client_name=name,
        protocol=2,  # the shapes of answers differ between the two
        decode_responses=True,
        max_connections=settings.redis_pool_max,
        timeout=settings.redis_timeout,
        socket_timeout=settings.redis_timeout,
        socket_connect_timeout=settings.redis_timeout,
        health_check_interval=25,
        retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
    )
    return Redis(connection_pool=pool)


async def _prepare(database: Any, stack: AsyncExitStack, *, wait: float) -> None:
    """Create the indexes: now where MongoDB answers, in the background where it does not."""
    preparing = asyncio.create_task(_create_indexes(database))
    stack.callback(preparing.cancel)
    await asyncio.wait([preparing], timeout=wait)


async def _create_indexes(database: Any) -> None:
    while True:
        try:
            await ensure_indexes(database)
        except PyMongoError as error:
            log.warning("indexes not created, MongoDB does not answer", error=str(error))
            await asyncio.sleep(INDEX_PAUSE)
        else:
            return
