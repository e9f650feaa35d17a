"""What a fulfilment finds out side by side, and what it makes of it; its stock is reserved as that of orders is."""

from typing import Any

from app.celery_app import celery
from app.contracts import Address, Backend, Finalization, Sale, TaskName
from app.engine.errors import PermanentError
from app.tasks.orders import STOCK
from app.tasks.outside import Call

SCORE_MAX = 80


class SuspectedError(PermanentError):
    """The fraud score is too high."""

    kind = "fraud_suspected"


@celery.task(name=TaskName.COMPUTE_TAX, base=Call, bind=True, pydantic=True)
def compute_tax(self: Call, payload: Sale) -> dict[str, Any]:
    """The tax on a sale: `{percent, tax}`, in cents."""
    return self.post(Backend.TAX, "/compute", step="tax", body=payload.model_dump())


@celery.task(name=TaskName.CHECK_ADDRESS, base=Call, bind=True, pydantic=True)
def check_address(self: Call, payload: Address) -> dict[str, Any]:
    """The address as it is to be written. Fails with `unknown_address`."""
    return self.post(Backend.ADDRESS, "/check", step="address", body=payload.model_dump())


@celery.task(name=TaskName.SCORE_FRAUD, base=Call, bind=True, pydantic=True)
def score_fraud(self: Call, payload: Sale) -> dict[str, Any]:
    """How suspicious a sale is: `{score}`, from 0 to 100."""
    return self.post(Backend.FRAUD, "/score", step="fraud", body=payload.model_dump())


@celery.task(name=TaskName.FINALIZE_FULFILMENT, base=Call, bind=True, pydantic=True)
def finalize(self: Call, payload: Finalization) -> dict[str, Any]:
    """Give the goods away, if nothing speaks against it. Fails with `fraud_suspected`."""
    if payload.score > SCORE_MAX:
        raise SuspectedError(f"The fraud score is {payload.score}; up to {SCORE_MAX} is trusted.")
    self.post(Backend.INVENTORY, f"/{payload.sku}/ship", step=STOCK)
    return {"total": payload.amount + payload.tax, **payload.model_dump()}
