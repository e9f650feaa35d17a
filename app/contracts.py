"""What API, workers and services share: the names of tasks and queues, and the payload of each task.

A new kind of work starts here: a name in `TaskName`, a payload class, and its row in `TASKS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
    CREATE_ACCOUNT = "onboarding.create_account"
    PROVIDE = "onboarding.provide"
    WELCOME = "onboarding.welcome"
    TAKE_BACK = "onboarding.take_back"
    SUMMARISE_CHUNK = "dataset.summarise_chunk"
    AGGREGATE = "dataset.aggregate"
    RUN_JOB = "jobs.run"

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
    USER_CREATED = "user.created"
    USER_DELETED = "user.deleted"
    ITEM_CREATED = "item.created"
    ORDER_PLACED = "order.placed"
    ORDER_FULFILLED = "order.fulfilled"


class Service(StrEnum):
    """Who takes part in events; a service that subscribes has the queue `events.<service>`."""

    ORDERS = "orders"
    FULFILMENT = "fulfilment"
    AUDIT = "audit"


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


class Onboarding(Payload):
    """Onboard somebody: an account, then a mailbox, a badge and a laptop, then a mail that welcomes them."""

    name: str = Field(min_length=1, max_length=200, examples=["Ada Lovelace"])
    email: str = Field(max_length=200, pattern=r"^[^@\s]+@[^@\s]+$", examples=["ada@example.com"])
    laptop: Literal["standard", "large", "sold-out"] = Field(
        default="standard", description="There is no `sold-out` one: its step fails, and the others are taken back."
    )
    seconds: float = Field(default=0, ge=0, le=10, description="How long each step takes, to have something to watch.")


class CreateAccount(Payload):
    """`onboarding.create_account`: make the account that all else belongs to."""

    name: str
    email: str
    seconds: float = 0


class Provide(Payload):
    """`onboarding.provide`: give the owner of an account a mailbox, a badge or a laptop."""

    account: str
    what: Literal["mailbox", "badge", "laptop"]
    model: str = ""
    seconds: float = 0


class Welcome(Payload):
    """`onboarding.welcome`: send the mail that says what there is."""

    account: str
    provided: dict[str, str]
    seconds: float = 0


class TakeBack(Payload):
    """`onboarding.take_back`: undo what a step has done, or may have done."""

    email: str
    what: Literal["account", "mailbox", "badge", "laptop"]
    seconds: float = 0


CHUNKS_MAX = 999  # with the task that aggregates a workflow has at most 1,000 members


class Dataset(Payload):
    """Summarise the rows of a data set: each chunk by a task of its own, then all of them together."""

    rows: int = Field(default=100_000, ge=1, le=1_000_000, strict=True)
    chunk: int = Field(default=2_000, ge=1, le=1_000_000, strict=True, description="Rows that one task reads.")
    seed: int = Field(default=1, ge=0, le=2**31, strict=True)

    @model_validator(mode="after")
    def bound_chunks(self) -> Self:
        """Refuse what would have more than `CHUNKS_MAX` chunks."""
        if -(-self.rows // self.chunk) > CHUNKS_MAX:
            raise ValueError(f"more than {CHUNKS_MAX} chunks: make them larger")
        return self


class Chunk(Payload):
    """`dataset.summarise_chunk`: rows `first` to `last` (not included) of the data set made from `seed`."""

    seed: int
    first: int
    last: int


class ChunkSummary(Payload):
    """Of some rows: how many, their values' sum, least, greatest, and how many fall into each tenth of the range."""

    count: int
    sum: int
    min: int
    max: int
    histogram: list[int]


class Summaries(Payload):
    """`dataset.aggregate`: the summaries of all chunks, in the order of rows."""

    chunks: list[ChunkSummary]


class Rehearsal(Payload):
    """How a job is to go wrong, so that it can be seen: nothing by default."""

    seconds: float = Field(default=0, ge=0, le=60, allow_inf_nan=False, description="What each step takes at least.")
    step: int | None = Field(default=None, ge=1, le=100, description="The number of a step that fails.")
    failures: int = Field(
        default=1, ge=1, le=1_000, description="The runs of the task in which it does, from the first."
    )
    permanent: bool = Field(default=False, description="Whether another attempt is of no use.")


class RunJob(Payload):
    """`jobs.run`: the steps of `app/tasks/jobs.py` over `payload`; the job's id follows from the task's."""

    name: str
    payload: dict[str, Any] = Field(default_factory=dict)
    rehearsal: Rehearsal = Rehearsal()


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
    TaskName.CREATE_ACCOUNT: TaskContract(CreateAccount, Queue.LIGHT),
    TaskName.PROVIDE: TaskContract(Provide, Queue.LIGHT),
    TaskName.WELCOME: TaskContract(Welcome, Queue.LIGHT),
    TaskName.TAKE_BACK: TaskContract(TakeBack, Queue.LIGHT),
    TaskName.SUMMARISE_CHUNK: TaskContract(Chunk, Queue.HEAVY_LOW),
    TaskName.AGGREGATE: TaskContract(Summaries, Queue.LIGHT),
    TaskName.RUN_JOB: TaskContract(RunJob, Queue.HEAVY),
}


_Name = Annotated[str, Field(min_length=1, max_length=200)]
_Amount = Annotated[int, Field(ge=0, le=2**53)]


class UserCreated(Payload):
    """`user.created`."""

    user_id: _Name
    email: Annotated[str, Field(max_length=320)] = ""


class UserDeleted(Payload):
    """`user.deleted`."""

    user_id: _Name


class ItemCreated(Payload):
    """`item.created`: POST /api/items has made an item."""

    item_id: _Name
    name: _Name
    category: Annotated[str, Field(max_length=100)] | None = None


class OrderLine(Payload):
    """A kind of goods, and how many of it."""

    sku: _Name
    quantity: Annotated[int, Field(ge=1, le=1_000_000)]


class OrderPlaced(Payload):
    """`order.placed`: somebody wants `lines`; `total` is in cents, `owner` the id of the API key that asked for it."""

    order_id: _Name
    customer_id: _Name
    lines: Annotated[tuple[OrderLine, ...], Field(min_length=1, max_length=100)]
    total: _Amount = 0
    owner: Annotated[str, Field(max_length=200)] = ""


class OrderFulfilled(Payload):
    """`order.fulfilled`: all of an order has left."""

    order_id: _Name


class TaskError(Payload):
    """Why a task failed."""

    type: str
    message: str


class TaskFailed(Payload):
    """`task.failed`: a task has failed for good, and has a dead letter."""

    task_id: str
    name: str
    queue: str
    reason: str
    error: TaskError
    attempts: int
    request_id: str


@dataclass(frozen=True, slots=True)
class EventContract:
    """The schema of an event's data, and its `version`: a changed schema is a new one.

    One that is `internal` is told by the stack of what it has done itself; nobody else may publish it.
    """

    data: type[Payload]
    version: int = 1
    internal: bool = False


EVENTS = {
    EventName.TASK_FAILED: EventContract(TaskFailed, internal=True),
    EventName.ITEM_CREATED: EventContract(ItemCreated, internal=True),
    EventName.USER_CREATED: EventContract(UserCreated),
    EventName.USER_DELETED: EventContract(UserDeleted),
    EventName.ORDER_PLACED: EventContract(OrderPlaced),
    EventName.ORDER_FULFILLED: EventContract(OrderFulfilled),
}

# Who hears of what: patterns of a topic exchange, in which `*` stands for one word and `#` for any number of them.
SUBSCRIPTIONS = {
    Service.ORDERS: ("order.fulfilled",),
    Service.FULFILMENT: ("order.placed",),
    Service.AUDIT: ("user.*", "order.#", "item.created"),
}


def event_queue(service: Service) -> str:
    """The queue in which events wait for `service`."""
    return f"events.{service}"


def subscribed(pattern: str, event_type: str) -> bool:
    """Whether a topic exchange sends what travels as `event_type` to a queue bound by `pattern`."""
    return _matches(tuple(pattern.split(".")), tuple(event_type.split(".")))


def _matches(pattern: tuple[str, ...], words: tuple[str, ...]) -> bool:
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(_matches(pattern[1:], words[count:]) for count in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and _matches(pattern[1:], words[1:])
