"""Shipping: `quote`, `book`, and `cancel` what was booked under the same key."""

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from app import problems
from app.backends.outside.checks import COUNTRIES
from app.backends.outside.errors import UnknownAddress
from app.backends.outside.world import Body, Country, Effect, KeyDep, KeyPath, WorldDep, reference
from app.contracts import Address

router = APIRouter(prefix="/shipping", tags=["shipping"])

HOME = "DE"
BASE, PIECE, ABROAD = 490, 100, 900  # cents


class Parcel(Body):
    """How many pieces go to which country."""

    quantity: Annotated[int, Field(ge=1, le=1_000)]
    country: Country


class Consignment(Body):
    """What is sent where."""

    sku: Annotated[str, Field(max_length=40)]
    quantity: Annotated[int, Field(ge=1, le=1_000)]
    address: Address


class Shipment(BaseModel):
    """A booked shipment, and its cost in cents."""

    shipment: str
    cost: int


def cost_of(quantity: int, country: str) -> int:
    """What a parcel costs in cents. Raises `UnknownAddress`."""
    if country not in COUNTRIES:
        raise UnknownAddress(f"Nothing is sent to {country}.")
    return BASE + PIECE * quantity + (0 if country == HOME else ABROAD)


@router.post("/quote")
async def quote(parcel: Parcel) -> dict[str, int]:
    """What it would cost, in cents."""
    return {"cost": cost_of(parcel.quantity, parcel.country)}


@router.post("/book")
async def book(body: Consignment, key: KeyDep, world: WorldDep) -> Shipment:
    """Book a shipment."""
    cost = cost_of(body.quantity, body.address.country)
    details: dict[str, Any] = {**body.model_dump(), "cost": cost}
    await world.effects.do("shipping", key, details)
    return Shipment(shipment=reference("S", key), cost=cost)


@router.post("/cancel")
async def cancel(key: KeyDep, world: WorldDep) -> Effect:
    """Cancel what was booked under this key; a booking that comes later is refused."""
    return Effect.model_validate(await world.effects.undo("shipping", key))


@router.get("/shipments/{key}")
async def get_shipment(key: KeyPath, world: WorldDep) -> Effect:
    """What was booked under a key."""
    row = await world.effects.get("shipping", key)
    if row is None:
        raise problems.NotFound
    return Effect.model_validate(row)
