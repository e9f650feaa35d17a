"""Fulfilments: made by events, shown over HTTP."""

from typing import Annotated

from fastapi import APIRouter, Depends, Response

from app import problems
from app.api.dependencies import ContextDep, IdentityDep, PrincipalDep, RequestIdDep
from app.backends.paging import Page
from app.backends.service2.schemas import Fulfilment, FulfilmentPage
from app.contracts import CountWords, TaskName
from app.database import Document, FulfilmentRepository
from app.engine.identity import Principal, body_digest
from app.models import TaskAccepted

router = APIRouter(prefix="/fulfilments", tags=["fulfilments"])

NONE_YET = "Nothing was done for an order with this id, or not yet."


async def get_fulfilments(context: ContextDep) -> FulfilmentRepository:
    """The fulfilments, for handlers."""
    return FulfilmentRepository(context.database)


FulfilmentsDep = Annotated[FulfilmentRepository, Depends(get_fulfilments)]
PageDep = Annotated[Page, Depends()]


@router.get("")
async def list_fulfilments(fulfilments: FulfilmentsDep, page: PageDep) -> FulfilmentPage:
    """A page of what was done for one's own orders, oldest first; for all with a key of admin scope."""
    rows, cursor = page.cut(await fulfilments.page(limit=page.limit, after=page.after, owner=page.owner))
    return FulfilmentPage(fulfilments=[_fulfilment(row) for row in rows], next_cursor=cursor)


@router.get("/{order_id}", responses={404: problems.example(problems.NotFound)})
async def get_fulfilment(order_id: str, fulfilments: FulfilmentsDep, principal: PrincipalDep) -> Fulfilment:
    """What was done for one order."""
    return _fulfilment(await _visible(fulfilments, order_id, principal))


@router.post("/{order_id}/slip", status_code=202, responses={404: problems.example(problems.NotFound)})
async def write_slip(
    order_id: str,
    context: ContextDep,
    fulfilments: FulfilmentsDep,
    principal: PrincipalDep,
    identity: IdentityDep,
    request_id: RequestIdDep,
    response: Response,
) -> TaskAccepted:
    """Have a worker write the packing slip: a task that this service names and does not import.

    It stands for work of yours; this one counts the words of the slip. The API tells what became of it.
    """
    row = await _visible(fulfilments, order_id, principal)
    goods = " ".join(f"{line['quantity']} {line['sku']}" for line in row["lines"])
    payload = CountWords(text=f"For {row['customer_id']}: {goods}").model_dump()
    accepted = await context.tasks.submit(
        TaskName.COUNT_WORDS,
        payload,
        task_id=identity.id,
        digest=body_digest({"order_id": order_id}),
        request_id=request_id,
        owner=principal.id,
        keyed=identity.from_client,
    )
    told = TaskAccepted(task_id=accepted.task_id, status_url=f"/api/async/status/{accepted.task_id}")
    response.headers["Location"] = told.status_url
    response.headers["Retry-After"] = str(problems.jittered(1))
    response.headers.update(identity.replay_headers(replayed=accepted.replayed))
    return told


async def _visible(fulfilments: FulfilmentRepository, order_id: str, principal: Principal) -> Document:
    row = await fulfilments.get(order_id)
    if row is None or not principal.may_see(row["owner"]):
        raise problems.NotFound(NONE_YET)
    return row


def _fulfilment(row: Document) -> Fulfilment:
    return Fulfilment(**{name: row[name] for name in Fulfilment.model_fields})
