"""The collections `outside_stock` and `outside_effects`: what the example's outside world keeps."""

from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from pymongo import ASCENDING, IndexModel, ReturnDocument
from pymongo.errors import DuplicateKeyError

from app import problems
from app.database.documents import Document, present

EFFECT_INDEXES = [IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0)]

# What the shelves hold when the world begins, and the price of a piece in cents.
SEED = {"lamp": (100, 2_500), "chair": (100, 8_000), "table": (100, 40_000)}
SHOWN_MAX = 100
RESERVATIONS_MAX = 10_000  # of one sku, in its one document
ROOM = {f"reservations.{RESERVATIONS_MAX - 1}": {"$exists": False}}
FULL = "As many reservations of {sku} are kept as may be."
ENDED = ("shipped", "released")
ENDED_KEPT = timedelta(hours=1)  # within which a late `reserve` still finds that it was released
EFFECT_KEPT = timedelta(days=1)
UNDONE = "It was taken back before it came; it is not done any more."

Outcome = Literal["shipped", "released"]


@dataclass(frozen=True, slots=True)
class Reserved:
    """What one key has reserved of a sku."""

    quantity: int
    price: int
    state: str


class StockRepository:
    """Stock, a document a sku: `stock` pieces that nobody has reserved, their `price` in cents, reservations by key.

    A reservation stands in the document whose stock it lessens, so that both change in one atomic update. All methods
    raise `pymongo.errors.PyMongoError` when MongoDB cannot serve, and `NotFound` (problems) for an unknown sku.
    """

    def __init__(self, database: Any) -> None:
        self._stock = database["outside_stock"]

    async def all(self) -> list[Document]:
        """The first 100 skus by name."""
        for sku in SEED:
            await self.get(sku)
        rows: list[Document] = await self._stock.find().sort("_id", ASCENDING).limit(SHOWN_MAX).to_list(SHOWN_MAX)
        return rows

    async def get(self, sku: str) -> Document:
        """A sku's document."""
        row: Document | None = await self._stock.find_one({"_id": sku})
        if row is None and sku in SEED:
            await self._open(sku, *SEED[sku])
            row = await self._stock.find_one({"_id": sku})
        if row is None:
            raise problems.NotFound(f"Nobody sells {sku}.")
        return row

    async def put(self, sku: str, *, stock: int, price: int) -> Document:
        """Say what is on the shelf, beside what is reserved, and what a piece costs."""
        await self._open(sku, stock, price)
        await self._stock.update_one({"_id": sku}, {"$set": {"stock": stock, "price": price}})
        return await self.get(sku)

    async def reserve(self, sku: str, quantity: int, *, key: str) -> Reserved | None:
        """Take `quantity` off the shelf for `key`, once; None where the shelf holds too few.

        Raises `Conflict` where it was released before, `KeyReused` for another quantity than before, and `Unavailable`
        where the document holds as many reservations as it may (problems).
        """
        row = await self.get(sku)
        if (earlier := _of(row, key)) is not None:
            return _repeated(earlier, quantity)
        await self._forget_ended(sku)
        taken = await self._stock.find_one_and_update(
            {
                "_id": sku,
                "stock": {"$gte": quantity},
                "reservations.key": {"$ne": key},
                **ROOM,
            },
            {
                "$inc": {"stock": -quantity},
                "$push": {"reservations": _reservation(key, quantity, row["price"], "reserved")},
            },
            return_document=ReturnDocument.AFTER,
        )
        if taken is not None:
            return Reserved(quantity, row["price"], "reserved")
        row = await self.get(sku)
        if (earlier := _of(row, key)) is not None:
            return _repeated(earlier, quantity)
        if len(row["reservations"]) >= RESERVATIONS_MAX:
            raise problems.Unavailable(FULL.format(sku=sku))
        return None

    async def end(self, sku: str, outcome: Outcome, *, key: str) -> None:
        """Ship what `key` has reserved, or put it back on the shelf, once; also what was shipped can be put back.

        What was never reserved is noted as released, so that a reservation that comes late is refused. Raises
        `Conflict` (problems) for shipping what is not reserved, and `Unavailable` as `reserve` does.
        """
        if outcome == "released" and await self._unknown(sku):
            return
        if (reserved := _of(await self.get(sku), key)) is None:
            if outcome == "shipped":
                raise problems.Conflict("Nothing is reserved under this key.")
            await self._forget_ended(sku)
            await self._stock.update_one(
                {"_id": sku, "reservations.key": {"$ne": key}, **ROOM},
                {"$push": {"reservations": _reservation(key, 0, 0, "released")}},
            )
            if (reserved := _of(await self.get(sku), key)) is None:
                raise problems.Unavailable(FULL.format(sku=sku))
        before = ["reserved"] if outcome == "shipped" else ["reserved", "shipped"]
        change: Document = {"$set": {"reservations.$.state": outcome, "reservations.$.at": present()}}
        if outcome == "released":
            change["$inc"] = {"stock": reserved.quantity}
        ended = await self._stock.update_one(
            {"_id": sku, "reservations": {"$elemMatch": {"key": key, "state": {"$in": before}}}}, change
        )
        if not ended.modified_count and outcome == "shipped":
            left = _of(await self.get(sku), key)
            if left is None or left.state != "shipped":
                raise problems.Conflict(UNDONE)

    async def _unknown(self, sku: str) -> bool:
        return sku not in SEED and await self._stock.find_one({"_id": sku}, {"_id": 1}) is None

    async def _open(self, sku: str, stock: int, price: int) -> None:
        with suppress(DuplicateKeyError):  # another request has opened it meanwhile
            await self._stock.insert_one({"_id": sku, "stock": stock, "price": price, "reservations": []})

    async def _forget_ended(self, sku: str) -> None:
        old = {"state": {"$in": list(ENDED)}, "at": {"$lt": present() - ENDED_KEPT}}
        await self._stock.update_one(
            {"_id": sku, "reservations": {"$elemMatch": old}}, {"$pull": {"reservations": old}}
        )


class EffectRepository:
    """Charges, shipments and mails: one document a key (`_id` is `router/key`), `done` or `undone`.

    Kept a day. All methods raise `pymongo.errors.PyMongoError` when MongoDB cannot serve.
    """

    def __init__(self, database: Any) -> None:
        self._effects = database["outside_effects"]

    async def get(self, router: str, key: str) -> Document | None:
        """What was done under a key, or None."""
        row: Document | None = await self._effects.find_one({"_id": f"{router}/{key}"})
        return row

    async def do(self, router: str, key: str, details: Document) -> bool:
        """Do it once; False where it was done before. Raises `Conflict` where it was taken back, also beforehand.

        Raises `KeyReused` (problems) where something else was done under this key.
        """
        row = _effect(router, key, "done") | {"details": details}
        try:
            await self._effects.insert_one(row)
        except DuplicateKeyError:
            earlier = await self.get(router, key)
            if earlier is None:
                raise
            if earlier["state"] == "undone":
                raise problems.Conflict(UNDONE) from None
            if earlier["details"] != details:
                raise problems.KeyReused from None
            return False
        return True

    async def undo(self, router: str, key: str) -> Document:
        """Take it back; what was never done is noted, so that it will not be done. Answers the document."""
        row = _effect(router, key, "undone") | {"details": None}
        try:
            await self._effects.insert_one(row)
        except DuplicateKeyError:
            await self._effects.update_one({"_id": row["_id"]}, {"$set": {"state": "undone"}})
            return await self.get(router, key) or row
        return row


def _reservation(key: str, quantity: int, price: int, state: str) -> Document:
    return {"key": key, "quantity": quantity, "price": price, "state": state, "at": present()}


def _of(row: Document, key: str) -> Reserved | None:
    found = next((entry for entry in row["reservations"] if entry["key"] == key), None)
    return found and Reserved(found["quantity"], found["price"], found["state"])


def _repeated(earlier: Reserved, quantity: int) -> Reserved:
    if earlier.state == "released":
        raise problems.Conflict(UNDONE)
    if earlier.quantity != quantity:
        raise problems.KeyReused
    return earlier


def _effect(router: str, key: str, state: str) -> Document:
    now = present()
    return {
        "_id": f"{router}/{key}", "router": router, "key": key, "state": state,
        "at": now, "expires_at": now + EFFECT_KEPT,
    }  # fmt: skip
