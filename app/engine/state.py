"""The transitions of task records: the scripts that alone write them, and who runs them.

Every transition is a Lua script (app/engine/lua), so that it happens whole or not at all, whoever races. Two thin
classes run them: one awaiting (API, beat), one blocking (Celery's prefork children).
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any, Literal, NamedTuple, Self, TypeVar

import orjson
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import RedisError

from app.database import ResultReader
from app.engine.message import Message
from app.engine.record import (
    CELERY_RESULT,
    FINISHED,
    GLANCE,
    KEPT,
    OPEN,
    RECOVERING,
    RECOVERING_MAX,
    Status,
    drain_key,
    error_document,
    record_key,
    waiting_key,
)

T = TypeVar("T")

CHUNK = 100  # scripts that one round trip runs: further ones let other clients in between
RUN_MARGIN = 30_000  # ms past its time limit after which a run that has not ended is taken for lost


def _keys(task_id: str, queue: str) -> list[str]:
    # What a transition may touch: the record, its queue, the archive's stream, the reconciler's list.
    return [record_key(task_id), waiting_key(queue), drain_key(queue), FINISHED, OPEN]


def _load(name: str, *, allow_oom: bool = True) -> str:
    # Only what adds a task may fail when Redis is full: ending one is what makes room.
    folder = files("app.engine").joinpath("lua")
    shebang = "#!lua flags=allow-oom\n" if allow_oom else ""
    return shebang + folder.joinpath("prelude.lua").read_text() + folder.joinpath(f"{name}.lua").read_text()


SCRIPTS = {
    **{name: _load(name, allow_oom=False) for name in ("create", "reopen")},
    **{
        name: _load(name)
        for name in (
            "confirm", "withdraw", "start", "recreate", "progress", "retry", "finish", "cancel", "archived",
            "bury", "retake", "postpone", "interrupt",
        )
    },
}  # fmt: skip


class Created(NamedTuple):
    """What `create` or `reopen` found: an outcome, and what belongs to it."""

    outcome: Literal["created", "leased", "exists", "conflict", "full", "backlog", "unknown"]
    epoch: int = 0
    created_at: int = 0
    lease_left: float = 0  # seconds
    drain_rate: float = 0  # tasks a second that leave the queue

    @classmethod
    def of(cls, answer: list[Any]) -> Self:
        """What a script's answer says."""
        match answer:
            case ["created", epoch, created_at]:
                return cls("created", epoch=int(epoch), created_at=int(created_at))
            case ["leased", left]:
                return cls("leased", lease_left=left / 1000)
            case ["full", rate]:
                return cls("full", drain_rate=float(rate))
            case [outcome, *_]:
                return cls(outcome)
        raise TypeError(answer)


class Started(NamedTuple):
    """What a worker is to do with a message."""

    outcome: Literal["run", "missing", "stale", "duplicate", "stored", "dead", "republish"]
    result: Any = None
    error: Mapping[str, Any] | None = None
    retries: int = 0
    due_in: float = 0  # seconds
    run: int = 0


class AsyncTaskStore:
    """Records as API and beat use them. Every method raises `redis.exceptions.RedisError` when Redis cannot serve."""

    def __init__(
        self, redis: AsyncRedis, *, queue_max: int, backlog_max: int, result_ttl: int, look_after: float
    ) -> None:
        self.redis = redis
        self.queue_max = queue_max
        self._backlog_max = backlog_max
        self._result_ttl = result_ttl
        self._look_after = int(look_after * 1000)
        self._scripts = {name: redis.register_script(text) for name, text in SCRIPTS.items()}

    async def create(self, message: Message, *, lease: float) -> Created:
        """Write `message`'s record, PENDING, under a lease of `lease` seconds, unless its identity has one already."""
        (created,) = await self.create_many([message], lease=lease)
        return _or_raise(created)

    async def create_many(
        self, messages: Sequence[Message], *, lease: float, known_only: bool = False
    ) -> list[Created | RedisError]:
        """`create` for each message, by few round trips; with `known_only` an identity without a record is "unknown".

        Raises nothing: a row that Redis could not serve has the error in its place.
        """
        length, bounds = int(lease * 1000), [self.queue_max, self._backlog_max, int(known_only)]
        rows = [
            [message.digest, length, message.publish, *bounds, *message.fields(), "epoch", message.epoch]
            for message in messages
        ]
        answers = await self._run_many("create", zip(messages, rows, strict=True))
        return [answer if isinstance(answer, RedisError) else Created.of(answer) for answer in answers]

    async def reopen(self, message: Message, *, lease: float, error: Mapping[str, str], reason: str) -> Created:
        """Make the failed task of `message` PENDING again, under a lease; `message.epoch` is the one it failed in.

        `error` and `reason` are why: what it says again if the message is withdrawn.
        """
        arguments = [message.epoch, int(lease * 1000), message.publish]
        arguments += [self.queue_max, self._backlog_max, orjson.dumps(error), reason]
        fields = [*message.fields(), "digest", message.digest, "created_at", message.created_at]
        return Created.of(await self._run("reopen", message, *arguments, *fields))

    async def confirm(self, message: Message) -> None:
        """End the lease of a message that the broker confirmed."""
        (answer,) = await self.confirm_many([message])
        _or_raise(answer)

    async def confirm_many(self, messages: Sequence[Message]) -> list[RedisError | None]:
        """`confirm` for each message; answers and errors as `create_many`'s."""
        return await self._run_many("confirm", ((message, [message.publish, self._look_after]) for message in messages))

    async def withdraw(self, message: Message, *, certain: bool, error: Mapping[str, str]) -> Status | None:
        """Take back a record whose message was not confirmed; `certain` if the broker refused it.

        Returns None if that was done, else the status that the record has by another hand.
        """
        (answer,) = await self.withdraw_many([(message, certain)], error=error)
        return _or_raise(answer)

    async def withdraw_many(
        self, rows: Sequence[tuple[Message, bool]], *, error: Mapping[str, str]
    ) -> list[Status | RedisError | None]:
        """`withdraw` for each message and whether that is certain; answers and errors as `create_many`'s."""
        why = orjson.dumps(error)
        answers = await self._run_many(
            "withdraw", ((message, [message.publish, int(certain), why]) for message, certain in rows)
        )
        return [Status(answer) if isinstance(answer, str) else answer for answer in answers]

    async def cancel(self, task_id: str, queue: str) -> str | None:
        """Ask for a task's end: CANCELLED, CANCELLING, another final status, or None for an unknown id."""
        error = error_document("cancelled", "Cancelled before it ran.")
        status: str | None = await self._scripts["cancel"](
            keys=_keys(task_id, queue), args=[task_id, orjson.dumps(error)]
        )
        return status

    async def record(self, task_id: str) -> dict[str, str]:
        """The record's fields; empty for an unknown id."""
        record: Any = await self.redis.hgetall(record_key(task_id))
        return dict(record)

    async def records(self, task_ids: list[str]) -> list[dict[str, str]]:
        """The records of many ids in one round trip."""
        async with self.redis.pipeline(transaction=False) as pipe:
            for task_id in task_ids:
                pipe.hgetall(record_key(task_id))
            rows: list[dict[str, str]] = await pipe.execute()
            return rows

    async def picked(self, task_ids: Sequence[str], fields: Sequence[str]) -> list[dict[str, str]]:
        """Some fields of many records, by few round trips; what is not set is not there."""
        rows = list[Any]()
        for begin in range(0, len(task_ids), CHUNK):
            async with self.redis.pipeline(transaction=False) as pipe:
                for task_id in task_ids[begin : begin + CHUNK]:
                    pipe.hmget(record_key(task_id), list(fields))
                rows += await pipe.execute()
        return [{name: value for name, value in zip(fields, row, strict=True) if value is not None} for row in rows]

    async def glances(self, task_ids: list[str]) -> list[dict[str, str]]:
        """Of many records what tells whether all is well with them; what is not set is not there."""
        return await self.picked(task_ids, GLANCE)

    async def complete(self) -> bool:
        """Whether a task without a record has none; not after Redis lost some that its queues still know of."""
        kept, recovering = await self.redis.mget(KEPT, RECOVERING)
        return kept is not None and recovering is None

    async def recovering(self) -> bool:
        """Whether Redis has lost records that may not be made again yet; notes it if it has since the last call."""
        if not await self.redis.exists(KEPT):
            # In this order: between the two, and should the second one fail, nobody is told that there is no such task.
            await self.redis.set(RECOVERING, 1, ex=RECOVERING_MAX)
            await self.redis.set(KEPT, 1)
        return bool(await self.redis.exists(RECOVERING))

    async def recovered(self, after: float) -> bool:
        """End the recovery, if it began more than `after` seconds ago; answers whether it did."""
        if RECOVERING_MAX - await self.redis.ttl(RECOVERING) < after:
            return False
        await self.redis.delete(RECOVERING)
        return True

    async def archived(self, group: str, rows: list[tuple[str, str, str]]) -> None:
        """Let records expire that MongoDB has: rows of (stream entry, task id, version as archived)."""
        async with self.redis.pipeline(transaction=False) as pipe:
            for entry, task_id, version in rows:
                await self._scripts["archived"](
                    keys=_keys(task_id, ""), args=[group, entry, version, self._result_ttl], client=pipe
                )
            await pipe.execute()

    async def bury(
        self, message: Message, *, too_often: bool, starts: int, error: Mapping[str, str], reason: str
    ) -> Literal["FAILURE", "again", "stale", "missing"]:
        """End a task whose message was dead-lettered.

        `too_often` tells that the broker gave up on a message that came back; with fewer than `starts` starts in the
        record the task is not to blame, and "again" has the reconciler publish it once more.
        """
        arguments = [message.epoch, message.retries, message.publish]
        arguments += [int(too_often), starts, orjson.dumps(error), reason]
        answer: Literal["FAILURE", "again", "stale", "missing"] = await self._run("bury", message, *arguments)
        return answer

    async def recreate(self, message: Message) -> None:
        """Make the record of a message again that Redis has lost, PENDING."""
        await self._run("recreate", message, self._look_after, *_recreated(message))

    async def due(self, limit: int) -> list[str]:
        """At most `limit` ids of open tasks that are to be looked at now, those that wait longest first."""
        seconds, microseconds = await self.redis.time()
        now = seconds * 1000 + microseconds // 1000
        ids: Any = await self.redis.zrange(OPEN, "-inf", now, byscore=True, offset=0, num=limit)
        return list(ids)

    async def retake(self, message: Message, *, lease: float, again_in: float) -> bool:
        """Take over a task that is due for a look, to publish `message` for it; False if another hand was faster."""
        arguments = [message.publish, int(lease * 1000), int(again_in * 1000)]
        return bool(await self._run("retake", message, *arguments))

    async def postpone(self, rows: list[tuple[str, float]]) -> None:
        """Look again at tasks later: rows of (task id, seconds until then)."""
        async with self.redis.pipeline(transaction=False) as pipe:
            for task_id, seconds in rows:
                await self._scripts["postpone"](
                    keys=_keys(task_id, ""), args=[task_id, int(seconds * 1000)], client=pipe
                )
            await pipe.execute()

    async def _run(self, name: str, message: Message, *arguments: Any) -> Any:
        keys = _keys(message.task_id, message.queue)
        return await self._scripts[name](keys=keys, args=[message.task_id, *arguments])

    async def _run_many(self, name: str, calls: Iterable[tuple[Message, list[Any]]]) -> list[Any]:
        """A script's answers to rows of (message, arguments), `CHUNK` a round trip; an error where a call failed."""
        script, waiting, answers = self._scripts[name], list(calls), list[Any]()
        try:
            if len(waiting) == 1:  # a pipeline would first ask whether the script is there
                return [await self._run(name, waiting[0][0], *waiting[0][1])]
            for begin in range(0, len(waiting), CHUNK):
                async with self.redis.pipeline(transaction=False) as pipe:
                    for message, arguments in waiting[begin : begin + CHUNK]:
                        keys = _keys(message.task_id, message.queue)
                        await script(keys=keys, args=[message.task_id, *arguments], client=pipe)
                    answers += await pipe.execute(raise_on_error=False)
        except RedisError as error:
            # To try the others would make the caller wait for as many time-outs.
            answers += [error] * (len(waiting) - len(answers))
        return answers


class TaskStore:
    """Records as a worker uses them.

    Every method raises `redis.exceptions.RedisError` when Redis cannot serve, and `pymongo.errors.PyMongoError` where
    only the archive could say what became of a task.
    `run_limits` has the seconds that a run may take, by queue.
    """

    def __init__(
        self,
        redis: Redis,
        archive: ResultReader,
        *,
        celery_result_ttl: int,
        look_after: float,
        run_limits: Mapping[str, float],
    ) -> None:
        self._redis = redis
        self._archive = archive
        self._celery_result_ttl = celery_result_ttl
        self._look_after = int(look_after * 1000)
        self._run_limits = {queue: int(seconds * 1000) + RUN_MARGIN for queue, seconds in run_limits.items()}
        self._rates = redis.register_script(files("app.engine").joinpath("rates.lua").read_text())
        self._scripts = {name: redis.register_script(text) for name, text in SCRIPTS.items()}

    def start(self, message: Message, worker: str, call: str) -> Started:
        """Decide whether a message's task runs; the same `call` again is answered like the first time.

        A record that Redis does not have is made again, unless the archive has it: then the task has ended, and its
        message is a late one.
        """
        cancelled = orjson.dumps(error_document("cancelled", "Cancelled while it ran."))
        arguments = [message.task_id, message.epoch, message.retries, message.publish, worker, cancelled]
        arguments += [self._run_limit(message), call]
        answer = self._script("start", message, *arguments)
        if answer == ["missing"]:
            ended = self._ended(message)
            if ended is not None:
                return _started_too_late(ended)
            self._recreate(message, running=False)
            answer = self._script("start", message, *arguments)
        match answer:
            case ["run", run]:
                return Started("run", run=int(run))
            case ["stored", result]:
                return Started("stored", result=json.loads(result))
            case ["dead", _, error]:
                return Started(
                    "dead", error=orjson.loads(error) if error else error_document("cancelled", "Cancelled.")
                )
            case ["republish", retries, due_in]:
                return Started("republish", retries=int(retries), due_in=due_in / 1000)
            case [outcome, *_]:
                return Started(outcome)
        raise TypeError(answer)

    def progress(self, message: Message, current: int, total: int) -> Literal["go", "cancel", "lost"]:
        """Write how far a run has come; answers whether it is to go on."""
        answer: Literal["go", "cancel", "lost"] = self._ensured("progress", message, *_run_of(message), current, total)
        return answer

    def retry(
        self, message: Message, due_in: float, error: Mapping[str, str] | None
    ) -> Literal["RETRY", "CANCELLED", "lost"]:
        """Write RETRY for the next attempt, due in `due_in` seconds; `message` is the attempt that failed.

        Without an `error` it has not failed: the same attempt is put off.
        """
        why = b"" if error is None else orjson.dumps(error)
        arguments = [message.task_id, *_run_of(message), int(due_in * 1000), why, self._look_after]
        arguments.append(orjson.dumps(error_document("cancelled", "Cancelled while it ran.")))
        arguments.append(message.retries + (error is not None))
        answer: Literal["RETRY", "CANCELLED", "lost"] = self._ensured("retry", message, *arguments)
        return answer

    def finish(
        self,
        message: Message,
        status: Status,
        fields: Mapping[str, str | bytes],
        celery_result: str | bytes,
        *,
        worker: str = "",
    ) -> str:
        """Write a run's final state with `fields` (result, or error and reason) and Celery's result.

        `worker` stands for the run where `message` does not know it. Answers the status, or "lost" where it had no
        effect.
        """
        run = [*_run_of(message)[:-1], message.run or worker]
        arguments = [message.task_id, *run, status, celery_result, self._celery_result_ttl]
        answer: str = self._ensured("finish", message, *arguments, *_flat(fields))
        return answer

    def reserve(self, name: str, rate: float, patience: float) -> tuple[bool, float]:
        """Reserve the next start of the task `name`, of which there are `rate` a second over all workers.

        Answers whether that was done and the seconds until then; not if these are more than `patience`.
        """
        interval = max(1, round(1_000_000 / rate))
        taken, wait = self._rates(keys=[f"rate:{name}"], args=[interval, int(patience * 1_000_000)])
        return bool(taken), wait / 1_000_000

    def cancelling(self, message: Message) -> bool:
        """Whether a running task is to stop."""
        return bool(self._redis.hexists(record_key(message.task_id), "cancel"))

    def interrupt(self, message: Message, worker: str) -> None:
        """Note that a run of `worker` was ended from outside: unless its message returns, it is published again."""
        self._script(
            "interrupt", message, message.task_id, message.epoch, message.retries, message.publish, worker,
            self._look_after,
        )  # fmt: skip

    def fail(self, task_id: str, error: Mapping[str, str]) -> None:
        """End a waiting task of which no more than the id is at hand; without effect where it does not wait."""
        record: Any = self._redis.hgetall(record_key(task_id))
        if not record:
            return
        message = Message.of_record(task_id, record)
        started = self.start(message, worker="", call=message.publish)
        if started.outcome == "run":
            fields: dict[str, str | bytes] = {"error": orjson.dumps(error), "reason": error["type"]}
            self.finish(replace(message, run=started.run), Status.FAILURE, fields, "{}")

    def _ensured(self, name: str, message: Message, *arguments: Any) -> Any:
        # For the run of a task, whose record may get lost under it.
        answer = self._script(name, message, *arguments)
        if answer == "missing":
            if self._ended(message) is not None:
                return "lost"
            self._recreate(message, running=True)
            answer = self._script(name, message, *arguments)
        return answer

    def _ended(self, message: Message) -> Mapping[str, Any] | None:
        """What the archive knows of a task whose record is gone: its result, if it has ended since the message."""
        archived = self._archive.get(message.task_id)
        return archived if archived is not None and archived["epoch"] >= message.epoch else None

    def _script(self, name: str, message: Message, *arguments: Any) -> Any:
        keys = _keys(message.task_id, message.queue)
        if name == "finish":
            keys.append(CELERY_RESULT + message.task_id)
        return self._scripts[name](keys=keys, args=arguments)

    def _recreate(self, message: Message, *, running: bool) -> None:
        fields = _recreated(message)
        if running:
            fields += ["status", Status.STARTED, "publish", message.publish, "attempts", message.run]
        look_after = self._run_limit(message) if running else self._look_after
        self._script("recreate", message, message.task_id, look_after, *fields)

    def _run_limit(self, message: Message) -> int:
        return self._run_limits.get(message.queue, max(self._run_limits.values()))


def _or_raise(answer: T | RedisError) -> T:
    if isinstance(answer, RedisError):
        raise answer
    return answer


def _run_of(message: Message) -> list[int | str]:
    return [message.epoch, message.retries, message.publish, message.run]


def _flat(fields: Mapping[str, Any]) -> list[Any]:
    return [part for field in fields.items() for part in field]


def _recreated(message: Message) -> list[Any]:
    fields: list[Any] = [*message.fields(), "epoch", message.epoch, "retries", message.retries]
    return [*fields, "digest", message.digest, "created_at", message.created_at or int(time.time() * 1000)]


def _started_too_late(ended: Mapping[str, Any]) -> Started:
    if ended["status"] == Status.SUCCESS:
        return Started("stored", result=ended["result"])
    return Started("dead", error=ended["error"] or error_document("cancelled", "Cancelled."))
