"""What the API does with tasks: take them in, tell of them, cancel them."""

import asyncio
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog
from pymongo.errors import PyMongoError
from redis.exceptions import OutOfMemoryError, RedisError

from app import problems
from app.contracts import TASKS, Queue, TaskName
from app.database import DeadLetterRepository, TaskResultRepository
from app.engine.dead_letters import message_of_letter
from app.engine.identity import Principal
from app.engine.message import Message
from app.engine.publisher import Publisher, Refused, Unconfirmed
from app.engine.record import Status, document, error_document
from app.engine.state import AsyncTaskStore, Created
from app.settings import Settings

log = structlog.get_logger(__name__)

LOST = (
    "Redis has lost its records. Those of tasks that wait are made again when workers take them up; "
    "whether this one is among them is not known yet."
)
CANCELLING = "CANCELLING"  # what a running task is until it notices that it is to end
RETRY_MAX = 40  # seconds that a client is sent away for at most, before the jitter
NOT_PUBLISHED = "not_published"  # the kind of failure of a task whose message was never confirmed


@dataclass(frozen=True, slots=True)
class Order:
    """A task that is asked for: `task_id` and `digest` come from the request's identity and body.

    `queue` is the contract's unless one is given.
    """

    name: TaskName
    payload: Mapping[str, Any]
    task_id: str
    digest: str
    queue: Queue | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """A task that will run (or has): its id, and whether an earlier request with the same identity made it."""

    task_id: str
    replayed: bool


class TaskService:
    """Creates tasks so that an id that was answered is always known, and the same request makes one task.

    The record is written first, then the message; what follows from each answer of the broker stands in `_settle`.
    One task is a batch of one.
    """

    def __init__(
        self,
        store: AsyncTaskStore,
        publisher: Publisher,
        results: TaskResultRepository,
        letters: DeadLetterRepository,
        settings: Settings,
    ) -> None:
        self._store = store
        self._publisher = publisher
        self._results = results
        self._letters = letters
        self._lookup_timeout = settings.archive_lookup_timeout
        # A publish waits at most one timeout for a connection and one for the confirm.
        self.lease = 2 * settings.publish_timeout + 1

    async def submit(  # noqa: PLR0913  all that makes a task
        self,
        name: TaskName,
        payload: Mapping[str, Any],
        *,
        task_id: str,
        digest: str,
        request_id: str,
        owner: str = "",
        queue: Queue | None = None,
        keyed: bool = False,
    ) -> Accepted:
        """Record and publish one task: see `submit_many`, whose problem this raises."""
        order = Order(name, payload, task_id, digest, queue)
        (outcome,) = await self.submit_many([order], request_id=request_id, owner=owner, keyed=keyed)
        if isinstance(outcome, problems.Problem):
            raise outcome
        return outcome

    async def submit_many(
        self,
        orders: Sequence[Order],
        *,
        request_id: str,
        owner: str = "",
        keyed: bool = False,
        workflow: str = "",
    ) -> list[Accepted | problems.Problem]:
        """Record and publish tasks, each settled for itself; answers a row an order.

        `keyed` says that the identity is a client's own, which is kept as long as the archive keeps its task.
        A row's problem is `KeyReused`, `InFlight`, `QueueFull`, `NotPublished` or `Unavailable`; after all but the
        first the same request may be sent again.
        """
        messages = _messages(orders, request_id=request_id, owner=owner, workflow=workflow)
        # Shielded: a client that goes away must not leave a record between its two writes.
        return await asyncio.shield(self._take_in(messages, keyed=keyed))

    async def forestall(self, orders: Sequence[Order], *, request_id: str, owner: str, workflow: str) -> None:
        """End tasks before they begin, whoever is about to submit them: he finds them CANCELLED.

        For tasks that no server knows. One that cannot be served now stays as it was. Raises `RedisError`.
        """
        messages = _messages(orders, request_id=request_id, owner=owner, workflow=workflow)
        for message, created in zip(messages, await self._create(messages, keyed=True), strict=True):
            if isinstance(created, Created) and created.outcome in ("created", "leased", "exists"):
                await self._store.cancel(message.task_id, message.queue)

    async def status(self, task_id: str, principal: Principal) -> dict[str, Any]:
        """The status document of a task, from Redis or, once it has expired there, from the archive.

        Raises `NotFound`, also for a task of somebody else, and `Unavailable` where the server that might know is away.
        """
        found = await self._find(task_id)
        if found is None or not principal.may_see(found["owner"]):
            raise problems.NotFound("There is no task with this id.")
        return found

    async def replay(self, letter: Mapping[str, Any], *, by: str) -> bool:
        """Publish the task of a dead letter again under its own id; False where another hand was faster.

        `letter` is as the repository has it, `by` names who asks. Raises `Conflict` for a letter that is no task, and
        `InFlight`, `QueueFull`, `NotPublished`, `Unavailable`; after each of those it may be tried again.
        """
        if letter["task_id"] is None:
            raise problems.Conflict("This message was never a task: it cannot be replayed.")
        if letter["state"] != "open":
            return False
        message = message_of_letter(letter)
        archived = await self._results.get(message.task_id)
        if archived is not None and archived["epoch"] > message.epoch:
            if archived["status"] != Status.FAILURE:
                # It was replayed by a hand that could not say so any more.
                await self._letters.settle(letter["_id"], "replayed", by=by)
                return False
            message = replace(message, epoch=archived["epoch"])
        try:
            created = await self._store.reopen(
                message, lease=self.lease, error=letter["error"], reason=letter["reason"]
            )
        except RedisError as error:
            raise _away(error) from error
        if created.outcome == "leased":
            raise problems.InFlight("Another replay of this task is being published.")
        if created.outcome not in ("created", "exists"):
            raise _full(message.queue, created, self._store.queue_max)
        if created.outcome == "created":
            message = replace(message, epoch=created.epoch, created_at=created.created_at)
            outcome = (await asyncio.shield(self._settle([message])))[message.publish]
            if isinstance(outcome, problems.Problem):
                raise outcome
        # Last: a letter that stays open for want of this is found to be replayed the next time.
        await self._letters.settle(letter["_id"], "replayed", by=by)
        return created.outcome == "created"

    async def terminate(self, task_id: str, principal: Principal) -> str:
        """Cancel a task and end the worker process that runs it, which may leave the work half done.

        Raises as `cancel` does, and `NotPublished` where the broker does not take the order.
        """
        status = await self.cancel(task_id, principal)
        if status == CANCELLING:
            try:
                await self._publisher.broadcast("end_run", {"task_id": task_id})
            except (Refused, Unconfirmed) as error:
                raise problems.NotPublished("The workers could not be told; the task stops by itself.") from error
        return status

    async def cancel(self, task_id: str, principal: Principal) -> str:
        """Ask for a task's end; answers CANCELLED, or CANCELLING while it runs.

        Raises `NotFound`, and `Conflict` for a task that has ended otherwise.
        """
        task = await self.status(task_id, principal)
        status = await self._store.cancel(task_id, task["queue"])
        if status is None:  # only the archive knows it
            status = str(task["status"])
        if status in (Status.SUCCESS, Status.FAILURE):
            raise problems.Conflict(f"The task has ended already: {status}.")
        return status

    async def _find(self, task_id: str) -> dict[str, Any] | None:
        try:
            record = await self._store.record(task_id)
        except RedisError as error:
            archived = await self._results.get(task_id)
            if archived is None:
                raise problems.Unavailable("Redis, which knows of unfinished tasks, is away.") from error
            return archived
        if record:
            return document(task_id, record)
        archived = await self._results.get(task_id)
        if archived is None and not await self._store.complete():
            raise problems.Unavailable(LOST, retry_after=5)
        return archived

    async def _take_in(self, messages: Sequence[Message], *, keyed: bool) -> list[Accepted | problems.Problem]:
        now = asyncio.get_running_loop().time
        deadline = now() + self.lease
        outcomes: dict[str, Accepted | problems.Problem] = {}  # by publish
        waiting = list(messages)
        while waiting:
            fresh, leased, pause = list[Message](), list[Message](), 0.1
            found = await self._create(waiting, keyed=keyed)
            _warn("Redis failed", found)
            for message, created in zip(waiting, found, strict=True):
                if isinstance(created, Created) and created.outcome == "created":
                    fresh.append(replace(message, epoch=created.epoch, created_at=created.created_at))
                elif isinstance(created, Created) and created.outcome == "leased" and now() <= deadline:
                    # Another request with this identity is publishing: it will end, or its lease will.
                    leased.append(message)
                    pause = min(pause, created.lease_left)
                else:
                    outcomes[message.publish] = _met(message, created, self._store.queue_max)
            # Before waiting for others, who may wait for these.
            if fresh:
                outcomes |= await self._settle(fresh)
            if leased:
                await asyncio.sleep(pause)
            waiting = leased
        return [outcomes[message.publish] for message in messages]

    async def _create(self, messages: Sequence[Message], *, keyed: bool) -> list[Created | RedisError]:
        """What each message's identity meets; a client's own is looked for in the archive, too."""
        created = await self._store.create_many(messages, lease=self.lease, known_only=keyed)
        unknown = [row for row, one in enumerate(created) if isinstance(one, Created) and one.outcome == "unknown"]
        if not unknown:
            return created
        archived = await self._archived([messages[row].task_id for row in unknown])
        fresh = {}
        for row in unknown:
            message, earlier = messages[row], archived.get(messages[row].task_id)
            if earlier is None:
                fresh[row] = message
            elif earlier.get("digest", message.digest) != message.digest:
                created[row] = Created("conflict")
            elif (earlier["error"] or {}).get("type") == NOT_PUBLISHED:
                # It never ran. The archive takes a result of a later epoch only.
                fresh[row] = replace(message, epoch=earlier["epoch"] + 1)
            else:
                created[row] = Created("exists")
        made = await self._store.create_many(list(fresh.values()), lease=self.lease)
        for row, one in zip(fresh, made, strict=True):
            created[row] = one
        return created

    async def _archived(self, task_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        try:
            return await asyncio.wait_for(self._results.known(task_ids), self._lookup_timeout)
        except (TimeoutError, PyMongoError) as error:
            log.warning("keys not looked up in the archive", tasks=len(task_ids), error=type(error).__name__)
            return {}

    async def _settle(self, messages: Sequence[Message]) -> dict[str, Accepted | problems.Problem]:
        """Publish messages whose records are under our lease, and end the leases; outcomes by publish."""
        errors: Sequence[Exception | None]
        try:
            errors = await self._publisher.publish_many(messages)
        except Exception as error:  # noqa: BLE001  whatever it was, no record must stay behind
            errors = [error] * len(messages)
        rows = list(zip(messages, errors, strict=True))
        await self._confirm([message for message, error in rows if error is None])
        withdrawn = await self._withdraw([(message, error) for message, error in rows if error is not None])
        return {message.publish: Accepted(message.task_id, replayed=False) for message in messages} | withdrawn

    async def _confirm(self, messages: Sequence[Message]) -> None:
        # A task whose lease stays is on the broker's disk: the lease runs out, and a second publish would do no harm.
        _warn("leases not cleared", await self._store.confirm_many(messages))

    async def _withdraw(self, rows: Sequence[tuple[Message, Exception]]) -> dict[str, problems.Problem]:
        """Take back what was not confirmed; the problems by publish. A worker may have been faster: that is none."""
        found = await self._store.withdraw_many(
            [(message, isinstance(error, Refused)) for message, error in rows],
            error=error_document(NOT_PUBLISHED, "The broker did not confirm this task; it was not run."),
        )
        _warn("tasks not published", [error for _, error in rows])
        _warn("Redis failed", found)
        outcomes: dict[str, problems.Problem] = {}
        for (message, _), status in zip(rows, found, strict=True):
            if isinstance(status, RedisError):
                outcomes[message.publish] = _away(status)
            elif status is None:
                outcomes[message.publish] = problems.NotPublished()
            elif status is Status.PENDING:
                # Another request has taken over; it answers for the task.
                outcomes[message.publish] = problems.InFlight()
        return outcomes


def _messages(orders: Sequence[Order], **common: str) -> list[Message]:
    return [
        Message.new(
            task_id=order.task_id,
            name=order.name,
            queue=order.queue or TASKS[order.name].queue,
            payload=order.payload,
            digest=order.digest,
            **common,
        )
        for order in orders
    ]


def _met(message: Message, created: Created | RedisError, queue_max: int) -> Accepted | problems.Problem:
    """What is answered to a request whose record could not be made."""
    if isinstance(created, RedisError):
        return _away(created)
    match created.outcome:
        case "exists":
            return Accepted(message.task_id, replayed=True)
        case "conflict":
            return problems.KeyReused()
        case "full" | "backlog":
            return _full(message.queue, created, queue_max)
        case "leased":
            return problems.InFlight()
    raise TypeError(created)


def _full(queue: str, created: Created, queue_max: int) -> problems.QueueFull:
    if created.outcome == "backlog":
        return problems.QueueFull("Finished tasks wait to be archived; nothing was done.")
    # When a tenth of the queue will have drained: sooner, the next of many clients would take the place.
    seconds = queue_max / 10 / created.drain_rate if created.drain_rate else RETRY_MAX
    return problems.QueueFull(
        f"The queue {queue} is full; nothing was done.", retry_after=math.ceil(min(seconds, RETRY_MAX))
    )


def _away(error: RedisError) -> problems.Problem:
    if isinstance(error, OutOfMemoryError):
        return problems.QueueFull("Redis holds as much as it may; nothing was done.")
    return problems.Unavailable("Redis does not answer; repeat the request with the same Idempotency-Key.")


def _warn(event: str, answers: Sequence[object]) -> None:
    # A line an error, not a task: a batch has a thousand.
    errors = Counter(f"{type(answer).__name__}: {answer}" for answer in answers if isinstance(answer, Exception))
    for error, count in errors.items():
        log.warning(event, error=error, tasks=count)
