"""What has become of a task, and cancelling it."""

from typing import Any
from uuid import UUID

from fastapi import APIRouter, Response

from app import problems
from app.api.dependencies import ContextDep
from app.engine.identity import ANYONE
from app.engine.state import FINAL
from app.models import TaskCancelled, TaskStatus

router = APIRouter(prefix="/api/async", tags=["tasks"], responses={404: problems.example(problems.NotFound)})


@router.get("/status/{task_id}", response_model=TaskStatus)
@router.get("/tasks/{task_id}", response_model=TaskStatus)
async def get_status(task_id: str, context: ContextDep, response: Response) -> dict[str, Any]:
    """A task's state, progress and result; `Retry-After` says when to ask again while it has not ended."""
    document = await context.tasks.status(_task_id(task_id), ANYONE)
    response.headers["Cache-Control"] = "no-store"
    if document["status"] not in FINAL:
        response.headers["Retry-After"] = str(problems.jittered(1))
    return document


@router.delete("/tasks/{task_id}", status_code=202, responses={409: problems.example(problems.Conflict)})
async def cancel(task_id: str, context: ContextDep) -> TaskCancelled:
    """Cancel a task: one that waits never starts, one that runs stops at its next report of progress."""
    known = _task_id(task_id)
    status = await context.tasks.cancel(known, ANYONE)
    return TaskCancelled(task_id=known, status=status, status_url=f"/api/async/status/{known}")


def _task_id(text: str) -> str:
    try:
        return str(UUID(text))
    except ValueError:
        raise problems.NotFound("There is no task with this id.") from None
