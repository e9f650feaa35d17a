"""Workflows as the API has them: started, told of, stopped."""

import time
from collections.abc import Mapping
from typing import Any

from redis.exceptions import RedisError

from app import problems
from app.contracts import Payload
from app.database import WorkflowRepository
from app.engine.conductor import Conductor, open_tasks
from app.engine.identity import Principal
from app.engine.plan import ENDED, Stage
from app.engine.service import TaskService
from app.engine.state import AsyncTaskStore

COUNT_KEPT = 1.0  # seconds for which a replica believes how many workflows are open


class WorkflowService:
    """Takes workflows in, at most `limit` that have not ended, and tells of them."""

    def __init__(
        self,
        workflows: WorkflowRepository,
        tasks: TaskService,
        store: AsyncTaskStore,
        conductor: Conductor,
        *,
        limit: int,
    ) -> None:
        self._workflows = workflows
        self._tasks = tasks
        self._store = store
        self._conductor = conductor
        self._max = limit
        self._open: tuple[float, int] = (0.0, 0)

    async def start(
        self, kind: str, payload: Payload, *, workflow_id: str, digest: str, **common: str
    ) -> tuple[str, bool]:
        """Take in a workflow of `kind`; answers its status and whether a request with the same identity made it before.

        `common` are its owner and request_id. With the document it is accepted: it is driven on by whoever comes to it,
        first of all in the background here. Raises `KeyReused`, `WorkflowsFull`, and `pymongo.errors.PyMongoError`.
        """
        found = await self._workflows.get(workflow_id)
        created = False
        if found is None:
            await self._refuse_too_many()
            found, created = await self._conductor.create(
                kind, payload, workflow_id=workflow_id, digest=digest, **common
            )
        if found["digest"] != digest:
            raise problems.KeyReused
        if created:
            self._conductor.drive(workflow_id)
        return str(found["status"]), not created

    async def find(self, workflow_id: str, principal: Principal) -> dict[str, Any]:
        """A workflow's document. Raises `NotFound`, also for one of somebody else."""
        found = await self._workflows.get(workflow_id)
        if found is None or not principal.may_see(found["owner"]):
            raise problems.NotFound("There is no workflow with this id.")
        return found

    async def glimpse(self, found: Mapping[str, Any]) -> dict[str, dict[str, str]]:
        """What Redis knows of the open tasks of a workflow, by id: their records without payload and result."""
        ids = open_tasks(found)
        fields = ("status", "attempts", "started_at", "current", "total")
        try:
            rows = await self._store.picked(ids, fields)
        except RedisError:
            return {}  # the document has what matters
        return dict(zip(ids, rows, strict=True))

    async def cancel(self, workflow_id: str, principal: Principal) -> Stage:
        """Stop a workflow and take back what it did; answers CANCELLED, or COMPENSATING while it does.

        Raises `NotFound`, and `Conflict` for one that has ended otherwise, or is failing already.
        """
        await self.find(workflow_id, principal)
        if await self._workflows.cancel(workflow_id):
            self._conductor.drive(workflow_id)
        found = await self.find(workflow_id, principal)
        status = Stage(found["status"])
        if status is Stage.CANCELLED or (found["cancel"] and status not in ENDED):
            return status if status is Stage.CANCELLED else Stage.COMPENSATING
        if status is Stage.COMPENSATING:
            raise problems.Conflict("The workflow has failed and is being compensated.")
        raise problems.Conflict(f"The workflow has ended already: {status}.")

    async def replay(self, letter: Mapping[str, Any], *, by: str) -> bool:
        """Replay a dead letter as `TaskService.replay` does, unless it is of a member of a workflow.

        Raises `Conflict` for that: its workflow has failed with it, and what it did is taken back. An undo may be run
        again as long as its workflow is known, which then waits for it and ends anew.
        """
        workflow_id = letter.get("workflow")
        if not workflow_id:
            return await self._tasks.replay(letter, by=by)
        found = await self._workflows.get(workflow_id)
        undos = found["compensations"] if found is not None else {}
        name = next((name for name, undo in undos.items() if undo["task_id"] == letter["task_id"]), None)
        if name is None:
            raise problems.Conflict("Its workflow has ended, or ends because of it: start the workflow again.")
        replayed = await self._tasks.replay(letter, by=by)
        if replayed:
            # Not before: the workflow would find the undo as it failed, and end.
            await self._workflows.reopen(workflow_id, name)
        return replayed

    async def _refuse_too_many(self) -> None:
        counted_at, count = self._open
        if time.monotonic() > counted_at + COUNT_KEPT:
            count = await self._workflows.count_open(self._max)
            self._open = (time.monotonic(), count)
        if count >= self._max:
            raise problems.WorkflowsFull
        self._open = (self._open[0], count + 1)
