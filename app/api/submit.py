"""Submitting a task in the name of a request: what all routes that make a task have in common."""

from typing import Annotated

from fastapi import Depends, Response
from pydantic import BaseModel

from app import problems
from app.api.dependencies import ContextDep, IdentityDep, RequestIdDep
from app.contracts import Payload, Queue, TaskName
from app.engine.identity import body_digest
from app.models import TaskAccepted


class Submit:
    """Submits one task in the name of the present request; a dependency of every route that makes a task."""

    def __init__(
        self, context: ContextDep, identity: IdentityDep, request_id: RequestIdDep, response: Response
    ) -> None:
        self._context = context
        self._identity = identity
        self._request_id = request_id
        self._response = response

    async def __call__(
        self, name: TaskName, payload: Payload, body: BaseModel, queue: Queue | None = None
    ) -> TaskAccepted:
        """Submit task `name`; `body` is the request's, which a repeat must equal."""
        accepted = await self._context.tasks.submit(
            name,
            payload.model_dump(),
            task_id=self._identity.id,
            digest=body_digest(body.model_dump(mode="json")),
            request_id=self._request_id,
            queue=queue,
        )
        status_url = f"/api/async/status/{accepted.task_id}"
        self._response.headers.update(
            {
                "Location": status_url,
                "Retry-After": str(problems.jittered(1)),
                **self._identity.replay_headers(replayed=accepted.replayed),
            }
        )
        return TaskAccepted(task_id=accepted.task_id, status_url=status_url)


SubmitDep = Annotated[Submit, Depends()]
