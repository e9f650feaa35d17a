"""What API, workers and services share: the names of tasks and queues, and the payload of each task.

A new kind of work starts here: a name in `TaskName`, a payload class, and its row in `TASKS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class Queue(StrEnum):
    """The task queues; a queue's name is its routing key."""

    HEAVY_HIGH = "heavy.high"
    HEAVY = "heavy"
    HEAVY_LOW = "heavy.low"
    LIGHT = "light"


class Priority(StrEnum):
    """How urgent a heavy task is; each has a queue of its own."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


HEAVY_QUEUES = {Priority.LOW: Queue.HEAVY_LOW, Priority.NORMAL: Queue.HEAVY, Priority.HIGH: Queue.HEAVY_HIGH}


class TaskName(StrEnum):
    """The names under which tasks travel; API and workers know each other by these alone."""

    PROCESS_DATA = "heavy.process_data"
    COUNT_WORDS = "light.count_words"

    RESERVE_STOCK = "orders.reserve_stock"
    RELEASE_STOCK = "orders.release_stock"
    BOOK_SHIPPING = "orders.book_shipping"
    CANCEL_SHIPPING = "orders.cancel_shipping"
    CHARGE_PAYMENT = "orders.charge_payment"
    REFUND_PAYMENT = "orders.refund_payment"
    CONFIRM_ORDER = "orders.confirm"
    RECALL_CONFIRMATION = "orders.recall_confirmation"
    COMPUTE_TAX = "fulfilment.compute_tax"
    CHECK_ADDRESS = "fulfilment.check_address"
    SCORE_FRAUD = "fulfilment.score_fraud"
    FINALIZE_FULFILMENT = "fulfilment.finalize"


class EventName(StrEnum):
    """The types of events, and the routing keys under which they travel."""

    TASK_FAILED = "task.failed"


def nested_deeper(value: Any, levels: int) -> bool:
    """Whether a JSON value holds objects or arrays in more than `levels` levels: what comes from outside is bounded."""
    if isinstance(value, Mapping):
        children = list(value.values())
    elif isinstance(value, (list, tuple)):
        children = list(value)
    else:
        return False
    return levels == 0 or any(nested_deeper(child, levels - 1) for child in children)


class Payload(BaseModel):
    """Base of all payloads: unknown fields are refused, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ProcessData(Payload):
    """`heavy.process_data`: derive `iterations` digests from `data`."""

    data: str
    iterations: int = Field(ge=1, le=100_000)


class CountWords(Payload):
    """`light.count_words`: count the words of `text`."""

    text: str


class Backend(StrEnum):
    """The services of the outside world; each has a circuit breaker of its own."""

    INVENTORY = "inventory"
    SHIPPING = "shipping"
    PAYMENT = "payment"
    TAX = "tax"
    MAIL = "mail"
    ADDRESS = "address"
    FRAUD = "fraud"


CARD = r"^tok_[A-Za-z0-9]{1,40}$"  # a token: a card's number belongs into no queue and no database
EMAIL = r"^[^@\s]{1,64}@[^@\s]{1,189}$"

Sku = Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")]
Quantity = Annotated[int, Field(ge=1, le=1_000)]
Cents = Annotated[int, Field(ge=1, le=10**12)]


class Address(Payload):
    """Where something is sent; `country` as ISO 3166-1 alpha-2 has it."""

    street: Annotated[str, Field(min_length=1, max_length=200)]
    city: Annotated[str, Field(min_length=1, max_length=100)]
    postcode: Annotated[str, Field(min_length=1, max_length=20)]
    country: Annotated[str, Field(pattern=r"^[A-Z]{2}$")]


class StockItem(Payload):
    """`orders.reserve_stock`: take `quantity` pieces off the shelf; `orders.release_stock`: put them back."""

    sku: Sku
    quantity: Quantity


class Shipment(Payload):
    """`orders.book_shipping`: send `quantity` pieces to `address`."""

    sku: Sku
    quantity: Quantity
    address: Address


class Charge(Payload):
    """`orders.charge_payment`: take `amount` cents from a card."""

    amount: Cents
    card: Annotated[str, Field(pattern=CARD)]


class Nothing(Payload):
    """`orders.cancel_shipping`, `refund_payment`, `recall_confirmation`: the workflow says what is taken back."""


class Confirmation(Payload):
    """`orders.confirm`: give the goods away and tell the customer."""

    sku: Sku
    quantity: Quantity
    email: Annotated[str, Field(pattern=EMAIL, max_length=254)]
    amount: Cents
    shipment: Annotated[str, Field(max_length=100)]


class Sale(Payload):
    """`fulfilment.compute_tax`, `fulfilment.score_fraud`: of a sale for `amount` cents."""

    amount: Cents
    country: Annotated[str, Field(pattern=r"^[A-Z]{2}$")]


class Finalization(Payload):
    """`fulfilment.finalize`: what all others found out, amounts in cents and the score from 0 to 100."""

    sku: Sku
    quantity: Quantity
    amount: Cents
    tax: Annotated[int, Field(ge=0)]
    score: Annotated[int, Field(ge=0, le=100)]
    address: Address


class OrderRequest(Payload):
    """The workflow `orders`: goods are reserved, shipped, paid for, and the customer is told. `card` is a token."""

    sku: Sku
    quantity: Quantity
    card: Annotated[str, Field(pattern=CARD)]
    email: Annotated[str, Field(pattern=EMAIL, max_length=254)]
    address: Address


class FulfilmentRequest(Payload):
    """The workflow `fulfilment`: goods sold for `amount` cents are reserved and checked on, then given away."""

    sku: Sku
    quantity: Quantity
    amount: Cents
    address: Address


@dataclass(frozen=True, slots=True)
class TaskContract:
    """What a publisher has to know of a task: its payload's schema and the queue it goes to unless told otherwise."""

    payload: type[Payload]
    queue: Queue


TASKS = {
    TaskName.PROCESS_DATA: TaskContract(ProcessData, Queue.HEAVY),
    TaskName.COUNT_WORDS: TaskContract(CountWords, Queue.LIGHT),
    # orders and fulfilment
    TaskName.RESERVE_STOCK: TaskContract(StockItem, Queue.LIGHT),
    TaskName.RELEASE_STOCK: TaskContract(StockItem, Queue.LIGHT),
    TaskName.BOOK_SHIPPING: TaskContract(Shipment, Queue.LIGHT),
    TaskName.CANCEL_SHIPPING: TaskContract(Nothing, Queue.LIGHT),
    TaskName.CHARGE_PAYMENT: TaskContract(Charge, Queue.LIGHT),
    TaskName.REFUND_PAYMENT: TaskContract(Nothing, Queue.LIGHT),
    TaskName.CONFIRM_ORDER: TaskContract(Confirmation, Queue.LIGHT),
    TaskName.RECALL_CONFIRMATION: TaskContract(Nothing, Queue.LIGHT),
    TaskName.COMPUTE_TAX: TaskContract(Sale, Queue.LIGHT),
    TaskName.CHECK_ADDRESS: TaskContract(Address, Queue.LIGHT),
    TaskName.SCORE_FRAUD: TaskContract(Sale, Queue.LIGHT),
    TaskName.FINALIZE_FULFILMENT: TaskContract(Finalization, Queue.LIGHT),
}
