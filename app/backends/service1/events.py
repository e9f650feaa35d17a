"""What service1 does when something has happened elsewhere."""

from typing import Any

import structlog
from bson import ObjectId

from app.contracts import EventName, OrderFulfilled
from app.database import OrderRepository
from app.engine.envelope import Event
from app.engine.events import Handlers

log = structlog.get_logger(__name__)
on = Handlers()


@on(EventName.ORDER_FULFILLED)
async def close(event: Event, session: Any, database: Any) -> None:
    """Note on the order that it is fulfilled; of one that does not wait for that there is nothing to note."""
    data = event.data
    assert isinstance(data, OrderFulfilled)  # noqa: S101  the contract of this type
    waited = ObjectId.is_valid(data.order_id) and await OrderRepository(database).fulfilled(
        ObjectId(data.order_id), session=session
    )
    if not waited:
        log.warning("an order that does not wait was told to be fulfilled", order_id=data.order_id)
