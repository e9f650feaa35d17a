"""The steps of an order, and what undoes each. A step and its undo name what is done alike: it is their key."""

from typing import Any

from app.celery_app import celery
from app.contracts import Backend, Charge, Confirmation, Nothing, Shipment, StockItem, TaskName
from app.tasks.outside import Call, UndoCall

STOCK, SHIPPING, PAYMENT, MAIL = "stock", "shipping", "payment", "mail"  # what is done, in keys


@celery.task(name=TaskName.RESERVE_STOCK, base=Call, bind=True, pydantic=True)
def reserve_stock(self: Call, payload: StockItem) -> dict[str, Any]:
    """Reserve goods; answers `{sku, quantity, amount}`, the amount in cents. Fails with `out_of_stock`."""
    body = {"quantity": payload.quantity}
    return self.post(Backend.INVENTORY, f"/{payload.sku}/reserve", step=STOCK, body=body)


@celery.task(name=TaskName.RELEASE_STOCK, base=UndoCall, bind=True, pydantic=True)
def release_stock(self: UndoCall, payload: StockItem) -> dict[str, Any]:
    """Put back what was reserved, or given away."""
    return self.undo(Backend.INVENTORY, f"/{payload.sku}/release", step=STOCK)


@celery.task(name=TaskName.BOOK_SHIPPING, base=Call, bind=True, pydantic=True)
def book_shipping(self: Call, payload: Shipment) -> dict[str, Any]:
    """Book a shipment; answers `{shipment, cost}`, the cost in cents. Fails with `unknown_address`."""
    return self.post(Backend.SHIPPING, "/book", step=SHIPPING, body=payload.model_dump())


@celery.task(name=TaskName.CANCEL_SHIPPING, base=UndoCall, bind=True, pydantic=True)
def cancel_shipping(self: UndoCall, payload: Nothing) -> dict[str, Any]:  # noqa: ARG001  Celery hands it over
    """Cancel the shipment."""
    return self.undo(Backend.SHIPPING, "/cancel", step=SHIPPING)


@celery.task(name=TaskName.CHARGE_PAYMENT, base=Call, bind=True, pydantic=True)
def charge_payment(self: Call, payload: Charge) -> dict[str, Any]:
    """Charge the card; answers `{charge, amount}`. Fails with `payment_refused`."""
    return self.post(Backend.PAYMENT, "/charge", step=PAYMENT, body=payload.model_dump())


@celery.task(name=TaskName.REFUND_PAYMENT, base=UndoCall, bind=True, pydantic=True)
def refund_payment(self: UndoCall, payload: Nothing) -> dict[str, Any]:  # noqa: ARG001
    """Refund the charge."""
    return self.undo(Backend.PAYMENT, "/refund", step=PAYMENT)


@celery.task(name=TaskName.CONFIRM_ORDER, base=Call, bind=True, pydantic=True)
def confirm(self: Call, payload: Confirmation) -> dict[str, Any]:
    """Give the goods away, then tell the customer: a mail is the last thing that happens."""
    self.post(Backend.INVENTORY, f"/{payload.sku}/ship", step=STOCK)
    self.progress(1, 2)
    text = f"{payload.quantity} x {payload.sku}, {payload.amount} cents, shipment {payload.shipment}"
    body = {"to": payload.email, "subject": "Your order", "text": text}
    self.post(Backend.MAIL, "/send", step=MAIL, body=body)
    return {"mailed": payload.email}


@celery.task(name=TaskName.RECALL_CONFIRMATION, base=UndoCall, bind=True, pydantic=True)
def recall_confirmation(self: UndoCall, payload: Nothing) -> dict[str, Any]:  # noqa: ARG001
    """Take the mail back, or keep it from being sent."""
    return self.undo(Backend.MAIL, "/recall", step=MAIL)
