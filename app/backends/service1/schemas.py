"""What clients of service1 say and hear."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from app.contracts import OrderLine
from app.models import Body


class OrderContent(Body):
    """What a client orders."""

    customer_id: str = Field(min_length=1, max_length=200, examples=["ann"])
    lines: list[OrderLine] = Field(min_length=1, max_length=100, examples=[[{"sku": "lamp-7", "quantity": 2}]])


class Order(OrderContent):
    """An order as stored: `FULFILLED` once service2 has told that it is."""

    model_config = ConfigDict(extra="ignore")

    id: str
    status: Literal["PLACED", "FULFILLED"]
    created_at: datetime
    fulfilled_at: datetime | None


class OrderPage(BaseModel):
    """A page of orders, oldest first; `next_cursor` is null on the last."""

    orders: list[Order]
    next_cursor: str | None
