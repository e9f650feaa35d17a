"""Submitting a task in the name of a request: what all routes that make a task have in common."""

from typing import Annotated, Any

from fastapi import Depends, Response
from pydantic import BaseModel

from app import problems
from app.api.dependencies import ContextDep, IdentityDep, RequestIdDep
from app.api.waiting import WaitDep
from app.contracts import Payload, Queue, TaskName
from app.engine.identity import body_digest
from app.models import TaskAccepted


class Submit:
    """Submits one task in the name of the present request; a dependency of every route that makes a task."""

    def __init__(
        self,
        context: ContextDep,
        identity: IdentityDep,
        request_id: RequestIdDep,
        response: Response,
        waiting: WaitDep,
    ) -> None:
        self._context = context
        self._waiting = waiting
        self._identity = identity
        self._request_id = request_id
        self._response = response

    async def __call__(
        self, name: TaskName, payload: Payload, body: BaseModel, queue: Queue | None = None
    ) -> TaskAccepted:
        """Submit task `name`; `body` is the request's, which a repeat must equal.

        Where the client prefers to wait (`Prefer: wait=N`) and the task ends in time, its status document is answered.
        """
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
        # A repeat that nginx makes has waited already, at the replica that is gone.
        again = accepted.replayed and not self._identity.from_client
        update = None if again else await self._waiting(accepted.task_id)
        if update is not None and update.final:
            del self._response.headers["Retry-After"]
            # FastAPI sends a Response as it is: no route that makes a task has to know of this.
            done: Any = Response(update.json(), 200, dict(self._response.headers), "application/json")
            return done  # type: ignore[no-any-return]
        return TaskAccepted(task_id=accepted.task_id, status_url=status_url)


SubmitDep = Annotated[Submit, Depends()]
