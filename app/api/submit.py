"""Submitting tasks in the name of a request: what the routes that make tasks, and the rows of a batch, share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel

from app import problems
from app.api.dependencies import ContextDep, IdentityDep, PrincipalDep, RequestIdDep
from app.api.waiting import WaitDep
from app.contracts import Payload, Queue, TaskName
from app.engine.identity import body_digest
from app.engine.service import Accepted, Order
from app.models import TaskAccepted


@dataclass(frozen=True, slots=True)
class Work:
    """The task that a request's body asks for; `queue` where clients choose it, else the contract's."""

    name: TaskName
    payload: Payload
    queue: Queue | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """What clients may ask for under one name: the schema of the request, and the work that it means."""

    request: type[BaseModel]
    work: Callable[[Any], Work]


class Submit:
    """Submits tasks in the name of the present request; a dependency of every route that makes one."""

    def __init__(
        self,
        context: ContextDep,
        identity: IdentityDep,
        principal: PrincipalDep,
        request_id: RequestIdDep,
        response: Response,
        waiting: WaitDep,
    ) -> None:
        self._context = context
        self._waiting = waiting
        self._identity = identity
        self._principal = principal
        self._request_id = request_id
        self._response = response

    async def __call__(self, work: Work, body: BaseModel) -> TaskAccepted:
        """Submit one task; `body` is the request's, which a repeat must equal. Raises what `submit_many` answers.

        Where the client prefers to wait (`Prefer: wait=N`) and the task ends in time, its status document is answered.
        """
        (outcome,) = await self._submit([_order(work, body, self._identity.id)])
        if isinstance(outcome, problems.Problem):
            raise outcome
        accepted = _accepted(outcome)
        self._response.headers.update(
            {
                "Location": accepted.status_url,
                "Retry-After": str(problems.jittered(1)),
                **self._identity.replay_headers(replayed=outcome.replayed),
            }
        )
        # A repeat that nginx makes has waited already, at the replica that is gone.
        again = outcome.replayed and not self._identity.from_client
        update = None if again else await self._waiting(accepted.task_id)
        if update is not None and update.final:
            del self._response.headers["Retry-After"]
            # FastAPI sends a Response as it is: no route that makes a task has to know of this.
            done: Any = Response(update.json(), 200, dict(self._response.headers), "application/json")
            return done  # type: ignore[no-any-return]
        return accepted

    async def many(self, rows: Mapping[int, tuple[Work, BaseModel]]) -> dict[int, TaskAccepted | problems.Problem]:
        """Submit rows of a batch, by their number in it; each has an answer of its own."""
        outcomes = await self._submit(
            [_order(work, body, self._identity.row_id(number)) for number, (work, body) in rows.items()]
        )
        taken = [outcome for outcome in outcomes if isinstance(outcome, Accepted)]
        replayed = bool(taken) and all(outcome.replayed for outcome in taken)
        self._response.headers.update(self._identity.replay_headers(replayed=replayed))
        return {
            number: _accepted(outcome) if isinstance(outcome, Accepted) else outcome
            for number, outcome in zip(rows, outcomes, strict=True)
        }

    async def _submit(self, orders: list[Order]) -> list[Accepted | problems.Problem]:
        return await self._context.tasks.submit_many(
            orders, request_id=self._request_id, owner=self._principal.id, keyed=self._identity.from_client
        )


SubmitDep = Annotated[Submit, Depends()]


class Offers:
    """Lets clients ask for tasks: the decorator of functions that say which work a request's body means.

    `@offer("name")` makes of such a function, whose only argument is the body, a `POST` of `name` below the router's
    prefix with its docstring, and a kind of rows in a batch with `"task": "name"`.
    """

    def __init__(self, router: APIRouter) -> None:
        self._router = router
        self.kinds: dict[str, Kind] = {}

    def __call__(self, name: str) -> Callable[[Callable[[Any], Work]], Callable[[Any], Work]]:
        """The decorator for one kind of task."""

        def register(work: Callable[[Any], Work]) -> Callable[[Any], Work]:
            (request,) = (hint for argument, hint in get_type_hints(work).items() if argument != "return")

            async def route(body: BaseModel, submit: SubmitDep) -> TaskAccepted:
                return await submit(work(body), body)

            route.__annotations__["body"] = request
            route.__name__, route.__doc__ = work.__name__, work.__doc__
            self._router.post(f"/{name}", status_code=202)(route)
            self.kinds[name] = Kind(request, work)
            return work

        return register


def _order(work: Work, body: BaseModel, task_id: str) -> Order:
    return Order(
        work.name, work.payload.model_dump(), task_id, body_digest(body.model_dump(mode="json")), queue=work.queue
    )


def _accepted(outcome: Accepted) -> TaskAccepted:
    return TaskAccepted(task_id=outcome.task_id, status_url=f"/api/async/status/{outcome.task_id}")
