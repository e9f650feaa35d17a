"""Orders: placed over HTTP together with an event, fulfilled when another service tells so."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response

from app import problems
from app.api.dependencies import ContextDep, IdentityDep, PrincipalDep
from app.api.parsing import object_id
from app.backends.paging import Page
from app.backends.service1.schemas import Order, OrderContent, OrderPage
from app.database import Document, OrderRepository
from app.engine.identity import body_digest

router = APIRouter(prefix="/orders", tags=["orders"])

NO_ORDER = "There is no order with this id."


async def get_orders(context: ContextDep) -> OrderRepository:
    """The orders, for handlers."""
    return OrderRepository(context.database)


OrdersDep = Annotated[OrderRepository, Depends(get_orders)]
PageDep = Annotated[Page, Depends()]


@router.post("", status_code=201)
async def place_order(
    content: OrderContent,
    context: ContextDep,
    orders: OrdersDep,
    identity: IdentityDep,
    principal: PrincipalDep,
    response: Response,
) -> Order:
    """Place an order; the event `order.placed` is written with it, so there is never one without the other."""
    fields = content.model_dump(mode="json")
    digest = body_digest(fields)
    row, new = await orders.place(
        fields,
        identity=identity.id,
        digest=digest,
        owner=principal.id,
        seconds=context.settings.mongodb_timeout,
    )
    if row["digest"] != digest:
        raise problems.KeyReused
    response.headers["Location"] = f"/api/service1/orders/{row['_id']}"
    response.headers.update(identity.replay_headers(replayed=not new))
    return _order(row)


@router.get("")
async def list_orders(orders: OrdersDep, page: PageDep) -> OrderPage:
    """A page of one's own orders in the order they were placed; of all with a key of admin scope."""
    rows, cursor = page.cut(await orders.page(limit=page.limit, after=page.after, owner=page.owner))
    return OrderPage(orders=[_order(row) for row in rows], next_cursor=cursor)


@router.get("/{order_id}", responses={404: problems.example(problems.NotFound)})
async def get_order(order_id: str, orders: OrdersDep, principal: PrincipalDep) -> Order:
    """One order."""
    row = await orders.get(object_id(order_id, NO_ORDER))
    if row is None or not principal.may_see(row["owner"]):
        raise problems.NotFound(NO_ORDER)
    return _order(row)


def _order(row: Document) -> Order:
    fields: dict[str, Any] = {name: row[name] for name in Order.model_fields if name in row}
    return Order(id=str(row["_id"]), **fields)
