"""The collection `fulfilments`, of service2."""

from typing import Any

from bson import ObjectId
from pymongo import ASCENDING, IndexModel

from app.contracts import EventName, OrderFulfilled, OrderPlaced
from app.database import outbox
from app.database.documents import Document, given, present

INDEXES = [
    IndexModel([("order_id", ASCENDING)], unique=True),
    IndexModel([("owner", ASCENDING), ("_id", ASCENDING)]),
]
SOURCE = "/service2/fulfilments"  # of the events that tell of fulfilments


class FulfilmentRepository:
    """The collection `fulfilments`: one document an order that service2 has taken care of.

    All methods raise `pymongo.errors.PyMongoError` when MongoDB cannot serve.
    """

    def __init__(self, database: Any) -> None:
        self._fulfilments = database["fulfilments"]
        self._outbox = database["outbox"]

    async def fulfil(self, order: OrderPlaced, *, session: Any) -> bool:
        """Fulfil an order and tell of it by the event `order.fulfilled`, in the transaction of `session`.

        False where that has been done: by another event that names the same order. Two of these at once end in
        `pymongo.errors.DuplicateKeyError` for one of them, which then has to be tried again.
        """
        if await self._fulfilments.find_one({"order_id": order.order_id}, session=session):
            return False
        lines = [line.model_dump() for line in order.lines]
        await self._fulfilments.insert_one(
            {
                "_id": ObjectId(), "order_id": order.order_id, "customer_id": order.customer_id, "lines": lines,
                "owner": order.owner, "created_at": present(),
            },
            session=session,
        )  # fmt: skip
        event = outbox.row(EventName.ORDER_FULFILLED, OrderFulfilled(order_id=order.order_id), source=SOURCE)
        await self._outbox.insert_one(event, session=session)
        return True

    async def get(self, order_id: str) -> Document | None:
        """What was done for an order, or None."""
        row: Document | None = await self._fulfilments.find_one({"order_id": order_id})
        return row

    async def page(self, *, limit: int, after: ObjectId | None, owner: str | None) -> list[Document]:
        """At most `limit` fulfilments as they were made, those after the id `after`; of everybody for None."""
        query: Document = given(owner=owner)
        if after is not None:
            query["_id"] = {"$gt": after}
        rows: list[Document] = await self._fulfilments.find(query).sort("_id", ASCENDING).limit(limit).to_list(limit)
        return rows
