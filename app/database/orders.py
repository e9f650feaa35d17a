"""The collection `orders`, of service1."""

from typing import Any

from bson import ObjectId
from pymongo import ASCENDING, IndexModel
from pymongo.errors import DuplicateKeyError

from app.contracts import EventName, OrderPlaced
from app.database import outbox
from app.database.documents import Document, given, present
from app.database.transactions import in_transaction

INDEXES = [
    IndexModel([("identity", ASCENDING)], unique=True),
    IndexModel([("owner", ASCENDING), ("_id", ASCENDING)]),
]
SOURCE = "/service1/orders"  # of the events that tell of orders


class OrderRepository:
    """The collection `orders`: what was asked of service1, PLACED until service2 has told that it is FULFILLED.

    All methods raise `pymongo.errors.PyMongoError` when MongoDB cannot serve.
    """

    def __init__(self, database: Any) -> None:
        self._database = database
        self._orders = database["orders"]
        self._outbox = database["outbox"]

    async def place(
        self, content: Document, *, identity: str, digest: str, owner: str, seconds: float
    ) -> tuple[Document, bool]:
        """Insert an order together with the event `order.placed`, within `seconds`; answers it and whether it is new.

        `content` has the fields `customer_id` and `lines`. Where the same identity has made one before, the answer is
        that one: its `digest` says whether its content was `content`.
        """
        order = {
            "_id": ObjectId(), **content, "status": "PLACED", "identity": identity, "digest": digest, "owner": owner,
            "created_at": present(), "fulfilled_at": None,
        }  # fmt: skip
        told = OrderPlaced.model_validate({"order_id": str(order["_id"]), "owner": owner, **content})
        event = outbox.row(EventName.ORDER_PLACED, told, source=SOURCE)

        async def insert(session: Any) -> None:
            await self._orders.insert_one(order, session=session)
            await self._outbox.insert_one(event, session=session)

        try:
            await in_transaction(self._database, insert, seconds=seconds)
        except DuplicateKeyError:
            earlier: Document | None = await self._orders.find_one({"identity": identity})
            if earlier is None:
                raise
            return earlier, False
        return order, True

    async def fulfilled(self, order_id: ObjectId, *, session: Any) -> bool:
        """Note that an order has left; False where it is not waiting for that."""
        outcome = await self._orders.update_one(
            {"_id": order_id, "status": "PLACED"},
            {"$set": {"status": "FULFILLED", "fulfilled_at": present()}},
            session=session,
        )
        return bool(outcome.matched_count)

    async def get(self, order_id: ObjectId) -> Document | None:
        """The order, or None."""
        order: Document | None = await self._orders.find_one({"_id": order_id})
        return order

    async def page(self, *, limit: int, after: ObjectId | None, owner: str | None) -> list[Document]:
        """At most `limit` orders in the order they were placed, those after the id `after`; of everybody for None."""
        query: Document = given(owner=owner)
        if after is not None:
            query["_id"] = {"$gt": after}
        rows: list[Document] = await self._orders.find(query).sort("_id", ASCENDING).limit(limit).to_list(limit)
        return rows
