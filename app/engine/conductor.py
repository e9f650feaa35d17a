"""Workflows at work: started, looked at, driven on and stopped.

The document in MongoDB is the workflow; its members are ordinary tasks. `advance` may run anywhere, at any time and in
many places at once: what it decides is a pure function (app/engine/plan.py), it takes effect by one write to the
version that was read, and only then tasks are submitted, under ids made of the workflow's.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import structlog
from pymongo.errors import PyMongoError
from redis.exceptions import RedisError

from app import problems
from app.contracts import Payload
from app.database import TaskResultRepository, WorkflowRepository
from app.engine.identity import Identity, body_digest, identity_uuid
from app.engine.loops import end, forever
from app.engine.plan import ENDED, RESULTS_MAX, Call, Plan, Seen, Stage, decide, opening
from app.engine.record import FINAL, Status, encode_result, moment
from app.engine.service import NOT_PUBLISHED, Order, TaskService
from app.engine.state import AsyncTaskStore
from app.engine.workflows import Definition, Flow
from app.settings import Settings

log = structlog.get_logger(__name__)

ATTEMPTS = 10  # at a workflow that others change at the same time; then it is due again
LOOK_MAX = 60.0  # seconds between two looks at most
AT_ONCE = 100  # tasks whose results are read at a time: with 256 KiB each
BACKGROUND_MAX = 50  # workflows that one replica drives on by itself; beat has the others
CLOSING = 5.0  # seconds that what is being driven on has when its process ends
REST_MAX = 0.5  # seconds after a round before the next one, at most
INTERVAL = 1.0  # seconds between two looks for what is due
FIELDS = ("status", "result", "error", "attempts", "started_at", "finished_at", "unpublished")


class Conductor:
    """Drives on the workflows of `definitions`, by kind. Any number of these may work on the same ones."""

    def __init__(  # noqa: PLR0913  it stands between all of them
        self,
        workflows: WorkflowRepository,
        tasks: TaskService,
        store: AsyncTaskStore,
        results: TaskResultRepository,
        *,
        definitions: Mapping[str, Definition],
        settings: Settings,
    ) -> None:
        self._workflows = workflows
        self._tasks = tasks
        self._store = store
        self._results = results
        self._definitions = definitions
        self._secret = settings.identity_secret.get_secret_value()
        self._look_after = settings.workflows_look_after
        self._batch = settings.workflows_batch
        self._woken = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()

    async def create(
        self, kind: str, payload: Payload, *, workflow_id: str, **common: str
    ) -> tuple[dict[str, Any], bool]:
        """Write the document of a new workflow; answers it, or the one that has its id, and whether it is new.

        `common` are its owner, digest and request_id.
        """
        flow = Flow(self._definitions[kind].steps(payload))
        new: dict[str, Any] = {
            "workflow_id": workflow_id, "kind": kind, **common, "payload": payload.model_dump_json(),
            "status": Stage.PENDING, "cancel": False, "error": None, "result": None,
            "members": opening(flow, lambda name: self._task_id(workflow_id, "do", name)),
            "compensations": {}, "uncompensated": [],
        }  # fmt: skip
        return await self._workflows.create(new, look_in=self._look_after)

    async def follow(self, ended: Sequence[Mapping[str, Any]]) -> None:
        """Look at the workflows of tasks that have ended; a follower of the archive."""
        ids = {row["workflow"] for row in ended if row.get("workflow")}
        if ids:
            await self._workflows.wake(ids)
            self._woken.set()

    async def run(self) -> None:
        """Drive on what is due until cancelled; servers that are away are waited for."""
        await forever(self._round_and_rest, "workflows", (RedisError, PyMongoError))

    async def round(self) -> int:
        """Look at what is due, at most WORKFLOWS_BATCH; answers how many that were.

        Raises `RedisError` or `PyMongoError`, once all have been tried.
        """
        ids = await self._workflows.due(self._batch)
        outcomes = await asyncio.gather(*(self._attempt(workflow_id) for workflow_id in ids))
        for error in outcomes:
            if error is not None:
                raise error
        return len(ids)

    async def aclose(self) -> None:
        """Let what is being driven on in the background end, or end it: beat goes on with it."""
        if self._background:
            await asyncio.wait(self._background, timeout=CLOSING)
        await end(self._background)

    async def advance(self, workflow_id: str) -> None:
        """Bring a workflow as far as it can come now. Raises `RedisError` or `PyMongoError`; then it is due again."""
        for _ in range(ATTEMPTS):
            found = await self._workflows.get(workflow_id)
            if found is None or found["status"] in ENDED:
                return
            definition = self._definitions[found["kind"]]
            flow = Flow(definition.steps(definition.request.model_validate_json(found["payload"])))
            seen = await self._look(found)
            plan = decide(flow, definition.outcome, found, seen, lambda name: self._task_id(workflow_id, "undo", name))
            if not await self._write(found, plan):
                continue
            if not await self._act(found, plan):
                return

    async def _write(self, found: dict[str, Any], plan: Plan) -> bool:
        if plan.values.get("status") in ENDED:
            ended = await self._workflows.end(found, plan.values)
            if ended:
                log.info("workflow ended", workflow_id=found["workflow_id"], status=plan.values["status"])
            return ended
        looks = 0 if plan.values else found["looks"]
        look_in = min(self._look_after * 2.0 ** min(looks, 20), LOOK_MAX)
        return await self._workflows.change(found, plan.values, look_in=look_in, looks=looks + 1)

    async def _act(self, found: Mapping[str, Any], plan: Plan) -> bool:
        """Submit and cancel as planned; answers whether it is worth to look again at once."""
        common = {"request_id": found["request_id"], "owner": found["owner"], "workflow": found["workflow_id"]}
        again = False
        unknown = plan.unknown if plan.unknown and await self._store.complete() else []
        stopping = {one["task_id"] for one in found["members"].values()} if plan.stopping else set[str]()
        forestalled = [call for call in unknown if call.task_id in stopping]
        if forestalled:
            await self._tasks.forestall([_order(call) for call in forestalled], **common)
            again = True
        submitted = [call for call in [*plan.release, *unknown] if call not in forestalled]
        if submitted:
            outcomes = await self._tasks.submit_many([_order(call) for call in submitted], keyed=True, **common)
            refused = [outcome for outcome in outcomes if isinstance(outcome, problems.Problem)]
            if refused:
                log.warning(
                    "members not submitted yet", workflow_id=found["workflow_id"], tasks=len(refused),
                    reason=refused[0].slug,
                )  # fmt: skip
        for call in plan.stop:
            status = await self._store.cancel(call.task_id, call.queue)
            again = again or status in FINAL
        return again

    async def _look(self, found: Mapping[str, Any]) -> dict[str, Seen]:
        """What is known of the open tasks of a workflow, by id."""
        ids, seen, size = open_tasks(found), dict[str, Seen](), 0
        for begin in range(0, len(ids), AT_ONCE):
            part = ids[begin : begin + AT_ONCE]
            rows = zip(part, await self._store.picked(part, FIELDS), strict=True)
            known = {task_id: _seen(row) for task_id, row in rows if "status" in row and "unpublished" not in row}
            missing = [task_id for task_id in part if task_id not in known]
            archived = await self._results.many(missing) if missing else {}
            known |= {
                task_id: _archived(row)
                for task_id, row in archived.items()
                if (row["error"] or {}).get("type") != NOT_PUBLISHED
            }
            seen |= known
            size += sum(len(one.result or "") for one in known.values())
            if size > RESULTS_MAX:
                break  # more than a workflow may have: it fails by these
        return seen

    async def _attempt(self, workflow_id: str) -> RedisError | PyMongoError | None:
        try:
            await self.advance(workflow_id)
        except (RedisError, PyMongoError) as error:
            return error
        except Exception:
            # Its definition is gone, or has a mistake: it must not keep the others back.
            log.exception("a workflow cannot be driven on", workflow_id=workflow_id)
            await self._workflows.postpone(workflow_id, look_in=LOOK_MAX)
        return None

    async def _round_and_rest(self) -> None:
        self._woken.clear()
        began = asyncio.get_running_loop().time()
        looked = await self.round()
        # Large workflows whose members end one after the other would be looked at without end: half the time is enough.
        await asyncio.sleep(min(asyncio.get_running_loop().time() - began, REST_MAX))
        if looked < self._batch:
            try:
                await asyncio.wait_for(self._woken.wait(), INTERVAL)
            except TimeoutError:
                return

    def drive(self, workflow_id: str) -> None:
        """Advance a workflow in the background, if not too much is going on there: then beat does."""
        if len(self._background) >= BACKGROUND_MAX:
            return
        task = asyncio.create_task(self._drive_on(workflow_id))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _drive_on(self, workflow_id: str) -> None:
        try:
            error = await self._attempt(workflow_id)
        except PyMongoError as away:
            error = away
        if error is not None:
            log.warning("a workflow waits for beat", workflow_id=workflow_id, error=f"{type(error).__name__}: {error}")

    def _task_id(self, workflow_id: str, what: str, name: str) -> str:
        return identity_uuid(self._secret, Identity("workflow", workflow_id, what, name))


def open_tasks(found: Mapping[str, Any]) -> list[str]:
    """The ids of a workflow's tasks that have been released and are not known to have ended."""
    tasks = [*found["members"].values(), *found["compensations"].values()]
    return [one["task_id"] for one in tasks if one["status"] == Status.PENDING]


def _order(call: Call) -> Order:
    return Order(call.task, call.payload, call.task_id, body_digest(call.payload), call.queue)


def _seen(row: Mapping[str, str]) -> Seen:
    if row["status"] not in FINAL:
        return Seen(row["status"])
    return Seen(
        status=row["status"],
        attempts=int(row.get("attempts", 0)),
        result=row.get("result") if row["status"] == Status.SUCCESS else None,
        error=orjson.loads(row["error"]) if "error" in row else None,
        started_at=moment(row.get("started_at")),
        finished_at=moment(row.get("finished_at")),
    )


def _archived(row: Mapping[str, Any]) -> Seen:
    return Seen(
        status=row["status"],
        attempts=row["attempts"],
        result=encode_result(row["result"]).decode() if row["status"] == Status.SUCCESS else None,
        error=row["error"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
    )
