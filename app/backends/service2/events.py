"""What service2 does when something has happened elsewhere."""

from typing import Any

import structlog

from app.contracts import EventName, OrderPlaced
from app.database import FulfilmentRepository
from app.engine.envelope import Event
from app.engine.events import Handlers

log = structlog.get_logger(__name__)
on = Handlers()


@on(EventName.ORDER_PLACED)
async def fulfil(event: Event, session: Any, database: Any) -> None:
    """Fulfil the order, once, and tell of it."""
    data = event.data
    assert isinstance(data, OrderPlaced)  # noqa: S101  the contract of this type
    if not await FulfilmentRepository(database).fulfil(data, session=session):
        log.warning("an order was placed by two events", order_id=data.order_id)
