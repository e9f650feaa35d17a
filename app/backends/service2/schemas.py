"""What clients of service2 hear."""

from datetime import datetime

from pydantic import BaseModel

from app.contracts import OrderLine


class Fulfilment(BaseModel):
    """What was done for an order."""

    order_id: str
    customer_id: str
    lines: list[OrderLine]
    created_at: datetime


class FulfilmentPage(BaseModel):
    """A page of fulfilments, oldest first; `next_cursor` is null on the last."""

    fulfilments: list[Fulfilment]
    next_cursor: str | None
