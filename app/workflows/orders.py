"""An order: stock, shipping, payment, confirmation, one after the other; what fails undoes what was done before it."""

from collections.abc import Sequence
from typing import Any

from app.contracts import Charge, Confirmation, Nothing, OrderRequest, Payload, Shipment, StockItem, TaskName
from app.engine.workflows import Definition, Results, Step, Undo, chain

KIND = "orders"


def nothing(_results: Results) -> Payload:
    """The payload of what is undone by its key alone."""
    return Nothing()


def steps(order: OrderRequest) -> Sequence[Step]:
    """The members of an order."""
    goods = StockItem(sku=order.sku, quantity=order.quantity)

    def cost(results: Results) -> int:
        total: int = results["inventory"]["amount"] + results["shipping"]["cost"]
        return total

    return chain(
        Step("inventory", TaskName.RESERVE_STOCK, lambda _: goods, undo=Undo(TaskName.RELEASE_STOCK, lambda _: goods)),
        Step(
            "shipping",
            TaskName.BOOK_SHIPPING,
            lambda _: Shipment(sku=order.sku, quantity=order.quantity, address=order.address),
            undo=Undo(TaskName.CANCEL_SHIPPING, nothing),
        ),
        Step(
            "payment",
            TaskName.CHARGE_PAYMENT,
            lambda results: Charge(amount=cost(results), card=order.card),
            after=("inventory",),
            undo=Undo(TaskName.REFUND_PAYMENT, nothing),
        ),
        Step(
            "confirmation",
            TaskName.CONFIRM_ORDER,
            lambda results: Confirmation(
                sku=order.sku,
                quantity=order.quantity,
                email=order.email,
                amount=cost(results),
                shipment=results["shipping"]["shipment"],
            ),
            after=("inventory", "shipping"),
            undo=Undo(TaskName.RECALL_CONFIRMATION, nothing),
        ),
    )


def outcome(results: Results) -> dict[str, Any]:
    """What the customer is told: the goods, what was charged in cents, and the numbers of shipment and charge."""
    return {**results["inventory"], **results["payment"], "shipment": results["shipping"]["shipment"]}


DEFINITION = Definition(KIND, OrderRequest, steps, outcome)
