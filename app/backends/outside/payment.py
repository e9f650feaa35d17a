"""Payment: `charge`, and `refund` what was charged under the same key."""

from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, Field

from app import problems
from app.backends.outside.errors import PaymentRefused
from app.backends.outside.world import Body, Effect, KeyDep, KeyPath, WorldDep, reference
from app.contracts import CARD

router = APIRouter(prefix="/payment", tags=["payment"])

AMOUNT_MAX = 500_000  # cents
REFUSED_CARD = "tok_4000"


class Charge(Body):
    """How much is taken from which card, in cents; `card` is a token, never a card's number."""

    amount: Annotated[int, Field(ge=1, le=10**12)]
    card: Annotated[str, Field(pattern=CARD)]


class Charged(BaseModel):
    """What was taken."""

    charge: str
    amount: int


@router.post("/charge")
async def charge(body: Charge, key: KeyDep, world: WorldDep) -> Charged:
    """Take money; 402 `payment-refused` past 5,000.00 and for cards whose token begins with tok_4000."""
    if body.card.startswith(REFUSED_CARD):
        raise PaymentRefused("The bank refuses this card.")
    if body.amount > AMOUNT_MAX:
        raise PaymentRefused(f"The card's limit is {AMOUNT_MAX} cents.")
    await world.effects.do("payment", key, body.model_dump())
    return Charged(charge=reference("C", key), amount=body.amount)


@router.post("/refund")
async def refund(key: KeyDep, world: WorldDep) -> Effect:
    """Give back what was charged under this key; a charge that comes later is refused."""
    return Effect.model_validate(await world.effects.undo("payment", key))


@router.get("/charges/{key}")
async def get_charge(key: KeyPath, world: WorldDep) -> Effect:
    """What was charged under a key."""
    row = await world.effects.get("payment", key)
    if row is None:
        raise problems.NotFound
    return Effect.model_validate(row)
