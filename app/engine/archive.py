"""The archive loop: final task records go from Redis to MongoDB, and only then may they expire."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import structlog
from pymongo.errors import PyMongoError
from redis.exceptions import RedisError, ResponseError

from app.contracts import EVENTS, EventName
from app.database import DeadLetterRepository, TaskResultRepository
from app.engine.dead_letters import is_dead, letter
from app.engine.envelope import document as document_of_event
from app.engine.envelope import moment
from app.engine.loops import forever
from app.engine.publisher import Publisher, Refused, Unconfirmed
from app.engine.record import FINAL, FINISHED, REFUSED, document
from app.engine.state import AsyncTaskStore

log = structlog.get_logger(__name__)

GROUP = "archive"
CLAIM_AFTER = 30_000  # ms after which an entry that another reader took and left is taken over
BLOCK = 500  # ms to wait for new entries; below REDIS_TIMEOUT
REFUSED_MAX = 10_000

Entry = tuple[str, dict[str, str]]
# Is told of status documents that MongoDB has, at least once; what it raises has them told again.
Follower = Callable[[Sequence[Mapping[str, Any]]], Awaitable[None]]


def failure_event(letter: Mapping[str, Any]) -> dict[str, Any]:
    """The event `task.failed` (CloudEvents 1.0); told again after a crash, with the same id."""
    shown = ("task_id", "name", "queue", "reason", "error", "attempts", "request_id")
    return document_of_event(
        event_id=letter["key"],
        kind=EventName.TASK_FAILED,
        source="/tasks",
        time=moment(letter["died_at"]),
        version=EVENTS[EventName.TASK_FAILED].version,
        data={name: letter[name] for name in shown},
    )


class Archive:
    """Reads the stream of finished tasks as a consumer group: what one reader leaves unfinished another takes up."""

    def __init__(  # noqa: PLR0913  it stands between all of them
        self,
        store: AsyncTaskStore,
        results: TaskResultRepository,
        letters: DeadLetterRepository,
        publisher: Publisher,
        *,
        reader: str,
        batch: int,
        followers: Sequence[Follower] = (),
    ) -> None:
        self._followers = followers
        self._store = store
        self._letters = letters
        self._publisher = publisher
        self._redis = store.redis
        self._results = results
        self._reader = reader
        self._batch = batch

    async def run(self) -> None:
        """Archive until cancelled; servers that are away are waited for."""
        await forever(self.round, "archive", (RedisError, PyMongoError))

    async def round(self) -> int:
        """Archive what is there, at most a batch; answers how many. Waits a moment where there is nothing.

        Raises `RedisError` or `PyMongoError`; what was read is then read again, by `XAUTOCLAIM`.
        """
        try:
            entries = await self._claim() or await self._read()
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            # A Redis that starts empty knows no group.
            await self._redis.xgroup_create(FINISHED, GROUP, id="0", mkstream=True)
            return 0
        if entries:
            await self._write(entries)
        return len(entries)

    async def _claim(self) -> list[Entry]:
        answer: Any = await self._redis.xautoclaim(FINISHED, GROUP, self._reader, CLAIM_AFTER, count=self._batch)
        return [entry for entry in answer[1] if entry[1]]

    async def _read(self) -> list[Entry]:
        answer: Any = await self._redis.xreadgroup(GROUP, self._reader, {FINISHED: ">"}, count=self._batch, block=BLOCK)
        return answer[0][1] if answer else []

    async def _write(self, entries: list[Entry]) -> None:
        ids = [fields["id"] for _, fields in entries]
        documents: list[dict[str, Any]] = []
        settled: list[tuple[str, str, str]] = []  # with the version that MongoDB has, if it has one
        refused: dict[str, str] = {}
        failures: dict[str, dict[str, Any]] = {}  # letters of tasks that were taken in and failed, by task
        for (entry, _), task_id, record in zip(entries, ids, await self._store.records(ids), strict=True):
            version = ""
            # A record that is gone was archived by an earlier entry; one that was reopened will have a later entry.
            if record.get("status") in FINAL:
                try:
                    documents.append(document(task_id, record))
                    if is_dead(record):
                        failures[task_id] = letter(task_id, record)
                    version = record["version"]
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    refused[task_id] = f"{type(error).__name__}: {error}"
            settled.append((entry, task_id, version))
        await self._letters.add(list(failures.values()))
        untold = await self._tell(failures)
        settled = [row for row in settled if row[1] not in untold]
        for position, reason in (await self._results.store(documents)).items():
            refused[documents[position]["task_id"]] = reason
        if documents:
            for follower in self._followers:
                await follower(documents)
        # What MongoDB does not have may not expire.
        await self._store.archived(GROUP, [(e, i, "" if i in refused else version) for e, i, version in settled])
        await self._set_aside(refused)

    async def _tell(self, failures: Mapping[str, dict[str, Any]]) -> set[str]:
        """Emit `task.failed` for each; answers those whose entries are to be taken up again, the broker being away."""
        for task_id, failed in failures.items():
            try:
                await self._publisher.emit(failure_event(failed))
            except (Refused, Unconfirmed) as error:
                log.warning("events wait for the broker", error=str(error))
                return set(list(failures)[list(failures).index(task_id) :])
        return set()

    async def _set_aside(self, refused: Mapping[str, str]) -> None:
        for task_id, reason in refused.items():
            log.error("a task's result cannot be archived, its record is kept", task_id=task_id, reason=reason)
            await self._redis.xadd(REFUSED, {"id": task_id, "reason": reason}, maxlen=REFUSED_MAX)
