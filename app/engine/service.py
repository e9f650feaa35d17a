"""What the API does with tasks: take them in, tell of them, cancel them."""

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import structlog
from redis.exceptions import OutOfMemoryError, RedisError

from app import problems
from app.contracts import TASKS, Queue, TaskName
from app.database import DeadLetterRepository, TaskResultRepository
from app.engine.dead_letters import message_of_letter
from app.engine.identity import Principal
from app.engine.message import Message, new_publish
from app.engine.publisher import Publisher, Refused, Unconfirmed
from app.engine.state import AsyncTaskStore, Created, Status, document, error_document

CANCELLING = "CANCELLING"  # what a running task is until it notices that it is to end
MEMORY_FULL = "Redis holds as much as it may; nothing was done."
RETRY_MAX = 60  # seconds that a client is sent away for at most

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Accepted:
    """A task that will run (or has): its id, and whether an earlier request with the same identity made it."""

    task_id: str
    replayed: bool


class TaskService:
    """Creates tasks so that an id that was answered is always known, and the same request makes one task.

    The record is written first, then the message; what follows from each answer of the broker stands in `_settle`.
    """

    def __init__(
        self,
        store: AsyncTaskStore,
        publisher: Publisher,
        results: TaskResultRepository,
        letters: DeadLetterRepository,
        *,
        publish_timeout: float,
    ) -> None:
        self._store = store
        self._publisher = publisher
        self._results = results
        self._letters = letters
        # A publish waits at most one timeout for a connection and one for the confirm.
        self.lease = 2 * publish_timeout + 1

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
    ) -> Accepted:
        """Record and publish one task.

        `task_id` and `digest` come from the request's identity and body; `queue` defaults to the contract's.
        Raises `KeyReused`, `InFlight`, `QueueFull`, `NotPublished`, `Unavailable` (problems); after each of the last
        three the same request may be sent again.
        """
        message = Message(
            task_id=task_id,
            name=name,
            queue=queue or TASKS[name].queue,
            payload=payload,
            digest=digest,
            request_id=request_id,
            owner=owner,
            publish=new_publish(),
        )
        created = await self._create(message)
        if created is None:
            return Accepted(task_id, replayed=True)
        await self._publish(created)
        return Accepted(task_id, replayed=False)

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
        `QueueFull`, `NotPublished`, `Unavailable`; after each of those it may be tried again.
        """
        if letter["task_id"] is None:
            raise problems.Conflict("This message was never a task: it cannot be replayed.")
        if letter["state"] != "open":
            return False
        message = message_of_letter(letter)
        try:
            created = await self._store.reopen(message, lease=self.lease)
        except OutOfMemoryError as error:
            raise problems.QueueFull(MEMORY_FULL) from error
        if created.outcome not in ("created", "exists"):
            raise self._full(message.queue, created)
        if created.outcome == "created":
            await self._publish(replace(message, epoch=created.epoch, created_at=created.created_at))
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
                await self._publisher.broadcast("revoke", {"task_id": task_id, "terminate": True, "signal": "TERM"})
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
        return document(task_id, record) if record else await self._results.get(task_id)

    async def _create(self, message: Message) -> Message | None:
        """The message to publish, or None where an earlier request has done so."""
        deadline = asyncio.get_running_loop().time() + self.lease
        while True:
            try:
                created = await self._store.create(message, lease=self.lease)
            except OutOfMemoryError as error:
                raise problems.QueueFull(MEMORY_FULL) from error
            match created.outcome:
                case "created":
                    return replace(message, epoch=created.epoch, created_at=created.created_at)
                case "exists":
                    return None
                case "conflict":
                    raise problems.KeyReused
                case "full" | "backlog":
                    raise self._full(message.queue, created)
                case "leased":
                    # Another request with this identity is publishing: it will end, or its lease will.
                    if asyncio.get_running_loop().time() > deadline:
                        raise problems.InFlight
                    await asyncio.sleep(min(created.lease_left, 0.1))

    def _full(self, queue: str, created: Created) -> problems.QueueFull:
        if created.outcome == "backlog":
            return problems.QueueFull("Finished tasks wait to be archived; nothing was done.")
        # When a tenth of the queue will have drained: sooner, the next of many clients would take the place.
        seconds = self._store.queue_max / 10 / created.drain_rate if created.drain_rate else RETRY_MAX
        return problems.QueueFull(
            f"The queue {queue} is full; nothing was done.", retry_after=math.ceil(min(seconds, RETRY_MAX))
        )

    async def _publish(self, message: Message) -> None:
        # Shielded: a client that goes away must not leave a record between its two writes.
        await asyncio.shield(self._settle(message))

    async def _settle(self, message: Message) -> None:
        try:
            await self._publisher.publish(message)
        except Exception as error:  # noqa: BLE001  whatever it was, the record must not stay behind
            await self._withdraw(message, error)
        else:
            await self._confirm(message)

    async def _confirm(self, message: Message) -> None:
        try:
            await self._store.confirm(message)
        except RedisError as error:
            # The task is on the broker's disk. Its lease runs out, and a second publish would do no harm.
            log.warning("lease not cleared", task_id=message.task_id, error=type(error).__name__)

    async def _withdraw(self, message: Message, error: Exception) -> None:
        log.warning("task not published", task_id=message.task_id, reason=f"{type(error).__name__}: {error}")
        status = await self._store.withdraw(
            message,
            certain=isinstance(error, Refused),
            error=error_document("not_published", "The broker did not confirm this task; it was not run."),
        )
        if status is None:
            raise problems.NotPublished from error
        if status is Status.PENDING:
            # Another request has taken over; it answers for the task.
            raise problems.InFlight from error
