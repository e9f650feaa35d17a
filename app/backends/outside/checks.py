"""Tax, address and fraud: what only answers, and keeps nothing."""

from fastapi import APIRouter
from pydantic import BaseModel

from app.backends.outside.errors import UnknownAddress
from app.backends.outside.world import Body, Cents, Country
from app.contracts import Address

router = APIRouter()

COUNTRIES = {"DE": 19, "FR": 20, "GB": 20, "CH": 8, "US": 0}  # where things are sent, and the tax in percent


class Sale(Body):
    """What is sold for how many cents, and where to."""

    amount: Cents
    country: Country


class Tax(BaseModel):
    """The tax on a sale."""

    percent: int
    tax: int


@router.post("/tax/compute", tags=["tax"])
async def compute(sale: Sale) -> Tax:
    """The tax in cents, rounded half up; none where nothing is known of the country."""
    percent = COUNTRIES.get(sale.country, 0)
    return Tax(percent=percent, tax=(sale.amount * percent + 50) // 100)


@router.post("/address/check", tags=["address"])
async def check(address: Address) -> Address:
    """The address as it is written on a parcel; 422 `unknown-address` for a country that nothing is sent to."""
    if address.country not in COUNTRIES:
        raise UnknownAddress(f"Nothing is sent to {address.country}.")
    tidy = {name: " ".join(value.split()) for name, value in address.model_dump().items()}
    return Address.model_validate(tidy)


@router.post("/fraud/score", tags=["fraud"])
async def score(sale: Sale) -> dict[str, int]:
    """How suspicious a sale is, from 0 to 100: a point for each hundred."""
    return {"score": min(100, sale.amount // 10_000)}
