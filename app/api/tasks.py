"""What has become of a task, told at once or as it changes, and cancelling it."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response

from app import problems
from app.api.dependencies import ContextDep, LiveDep, PrincipalDep, require_admin
from app.api.parsing import uuid
from app.api.stream import STREAM, TaskStream
from app.api.waiting import WAIT_MAX, WaitDep
from app.engine.live import Update
from app.engine.record import FINAL
from app.models import TaskCancelled, TaskStatus

NO_TASK = "There is no task with this id."

router = APIRouter(prefix="/api/async", tags=["tasks"], responses={404: problems.example(problems.NotFound)})


@router.get("/status/{task_id}", response_model=TaskStatus)
@router.get("/tasks/{task_id}", response_model=TaskStatus)
async def get_status(
    task_id: str,
    context: ContextDep,
    principal: PrincipalDep,
    response: Response,
    waiting: WaitDep,
    wait: Annotated[
        int | None, Query(ge=0, le=WAIT_MAX, description="Seconds to wait for the task's end; wins over `Prefer`.")
    ] = None,
) -> dict[str, Any]:
    """A task's state, progress and result; `Retry-After` says when to ask again while it has not ended."""
    known = uuid(task_id, NO_TASK)
    document = await context.tasks.status(known, principal)
    response.headers["Cache-Control"] = "no-store"
    if document["status"] in FINAL:
        waiting.applied(wait)
    elif update := await waiting(known, wait):
        document = update.document
    if document["status"] not in FINAL:
        response.headers["Retry-After"] = str(problems.jittered(1))
    return document


@router.get("/tasks/{task_id}/stream", status_code=200, response_class=TaskStream, responses=STREAM)
async def stream(
    task_id: str,
    context: ContextDep,
    principal: PrincipalDep,
    live: LiveDep,
    last_event_id: Annotated[
        str, Header(description="`id` of the last event that was seen; EventSource sends it by itself.")
    ] = "",
) -> Response:
    """A task's status document at each change, as Server-Sent Events (WHATWG HTML), until it has ended.

    An event's `id` names the version of the document, `epoch.version`, and `epoch.version-final` at the end. Only the
    latest of several changes is told to a reader who is slow. After the final event the stream ends; whoever comes back
    with its id gets 204, after which EventSource does not come again.
    """
    known = uuid(task_id, NO_TASK)
    present = Update(await context.tasks.status(known, principal))
    if present.final and present.id == last_event_id:
        return Response(status_code=204)
    return TaskStream(live, known, present, last_event_id, send_timeout=context.settings.stream_send_timeout)


@router.delete("/tasks/{task_id}", status_code=202, responses={409: problems.example(problems.Conflict)})
async def cancel(
    task_id: str,
    context: ContextDep,
    principal: PrincipalDep,
    terminate: Annotated[
        bool, Query(description="End the process that runs it, wherever its work is; needs a key of admin scope.")
    ] = False,
) -> TaskCancelled:
    """Cancel a task: one that waits never starts, one that runs stops at its next report of progress."""
    known = uuid(task_id, NO_TASK)
    if terminate:
        require_admin(principal)
        status = await context.tasks.terminate(known, principal)
    else:
        status = await context.tasks.cancel(known, principal)
    return TaskCancelled(task_id=known, status=status, status_url=f"/api/async/status/{known}")
