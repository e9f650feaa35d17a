"""A fulfilment: four things side by side, then a decision on all of them."""

from collections.abc import Sequence

from app.contracts import Address, Finalization, FulfilmentRequest, Sale, StockItem, TaskName
from app.engine.workflows import Definition, Results, Step, Undo, chord

KIND = "fulfilment"


def steps(request: FulfilmentRequest) -> Sequence[Step]:
    """The members of a fulfilment."""
    goods = StockItem(sku=request.sku, quantity=request.quantity)
    sale = Sale(amount=request.amount, country=request.address.country)

    def found(results: Results) -> Finalization:
        return Finalization(
            **results["stock"] | {"amount": request.amount},
            tax=results["tax"]["tax"],
            score=results["fraud"]["score"],
            address=Address.model_validate(results["address"]),
        )

    return chord(
        [
            Step("stock", TaskName.RESERVE_STOCK, lambda _: goods, undo=Undo(TaskName.RELEASE_STOCK, lambda _: goods)),
            Step("tax", TaskName.COMPUTE_TAX, lambda _: sale),
            Step("address", TaskName.CHECK_ADDRESS, lambda _: request.address),
            Step("fraud", TaskName.SCORE_FRAUD, lambda _: sale),
        ],
        Step("finalize", TaskName.FINALIZE_FULFILMENT, found),
    )


DEFINITION = Definition(KIND, FulfilmentRequest, steps, lambda results: results["finalize"])
