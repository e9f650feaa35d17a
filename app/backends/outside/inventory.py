"""Stock: `reserve`, then `ship`, or `release`, under one key."""

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from app.backends.outside.errors import OutOfStock
from app.backends.outside.world import Body, KeyDep, Sku, WorldDep

router = APIRouter(prefix="/inventory", tags=["inventory"])


class Shelf(Body):
    """What is to be on the shelf, beside what is reserved."""

    stock: int = Field(ge=0, le=1_000_000)
    price: Annotated[int, Field(ge=0, le=1_000_000)] = 1_000


class Stock(BaseModel):
    """What is on the shelf, what is reserved and not shipped yet, and the price of a piece in cents."""

    sku: str
    stock: int
    reserved: int
    price: int


class Quantity(Body):
    """How many."""

    quantity: Annotated[int, Field(ge=1, le=1_000)]


class Reservation(BaseModel):
    """What was reserved, and what it costs in cents."""

    sku: str
    quantity: int
    amount: int


@router.get("")
async def list_stock(world: WorldDep) -> list[Stock]:
    """What there is, at most 100 skus."""
    return [_shown(row) for row in await world.stock.all()]


@router.get("/{sku}")
async def get_stock(sku: Sku, world: WorldDep) -> Stock:
    """What there is of one sku."""
    return _shown(await world.stock.get(sku))


@router.put("/{sku}")
async def put_stock(sku: Sku, shelf: Shelf, world: WorldDep) -> Stock:
    """Fill or empty a shelf, or open a new one."""
    return _shown(await world.stock.put(sku, stock=shelf.stock, price=shelf.price))


@router.post("/{sku}/reserve")
async def reserve(sku: Sku, body: Quantity, key: KeyDep, world: WorldDep) -> Reservation:
    """Take some off the shelf; 409 `out-of-stock` where it holds too few."""
    reserved = await world.stock.reserve(sku, body.quantity, key=key)
    if reserved is None:
        raise OutOfStock(f"There are not {body.quantity} of {sku}.")
    return Reservation(sku=sku, quantity=reserved.quantity, amount=reserved.quantity * reserved.price)


@router.post("/{sku}/ship", status_code=204)
async def ship(sku: Sku, key: KeyDep, world: WorldDep) -> None:
    """Give away what is reserved under this key."""
    await world.stock.end(sku, "shipped", key=key)


@router.post("/{sku}/release", status_code=204)
async def release(sku: Sku, key: KeyDep, world: WorldDep) -> None:
    """Put back what was reserved under this key; a reservation that comes later is refused."""
    await world.stock.end(sku, "released", key=key)


def _shown(row: dict[str, Any]) -> Stock:
    reserved = sum(entry["quantity"] for entry in row["reservations"] if entry["state"] == "reserved")
    return Stock(sku=row["_id"], stock=row["stock"], reserved=reserved, price=row["price"])
