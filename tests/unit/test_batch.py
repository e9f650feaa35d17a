from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import ValidationError

from app import problems
from app.api.batch import SCHEMAS, Batch
from app.api.processing import offer
from app.api.submit import Work
from app.contracts import CountWords, ProcessData, Queue, TaskName
from app.engine.service import Accepted, Order
from app.settings import Settings

ClientOf = Callable[[Any], httpx.AsyncClient]
GOOD = {"data": "x"}


def rows(*values: Any) -> list[Any]:
    return Batch.model_validate({"tasks": values}).tasks


def work(row: Any) -> Work:
    return offer.kinds[row.task].work(row)


def errors(row: Any) -> list[tuple[list[Any], str]]:
    assert isinstance(row, problems.Invalid)
    return [(error["loc"], error["type"]) for error in row.errors or []]


def test_a_row_means_the_task_that_its_own_route_makes():
    heavy, named, light = rows(
        {"data": "x"},
        {"task": "process", "data": "y", "iterations": 7, "priority": "high"},
        {"task": "count-words", "text": "a b"},
    )
    assert work(heavy) == Work(TaskName.PROCESS_DATA, ProcessData(data="x", iterations=100), Queue.HEAVY)
    assert work(named) == Work(TaskName.PROCESS_DATA, ProcessData(data="y", iterations=7), Queue.HEAVY_HIGH)
    assert work(light) == Work(TaskName.COUNT_WORDS, CountWords(text="a b"))


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        ({}, [(["data"], "missing")]),
        ({"data": 1, "iterations": 0}, [(["data"], "string_type"), (["iterations"], "greater_than_equal")]),
        ({"task": "count-words", "data": "x"}, [(["text"], "missing"), (["data"], "extra_forbidden")]),
        ({"task": "count-words", "text": "é" * 40_000}, [(["text"], "value_error")]),
        ({"task": "other", "data": "x"}, [(["task"], "unknown_task")]),
        ({"task": None, "data": "x"}, [(["task"], "unknown_task")]),
        ({"task": ["process"], "data": "x"}, [(["task"], "unknown_task")]),
        ([], [([], "model_type")]),
        (None, [([], "model_type")]),
    ],
)
def test_a_bad_row_is_refused_alone_and_says_where(bad: Any, found: list[Any]):
    first, refused, last = rows(GOOD, bad, GOOD)
    assert (first, last) == tuple(rows(GOOD, GOOD))
    assert errors(refused) == found


def test_of_a_row_with_many_errors_some_are_told():
    (row,) = rows({f"field {number}": 0 for number in range(500)})
    assert len(errors(row)) == 20


class Tasks:
    """A task service that answers what it is told to."""

    def __init__(self, *outcomes: problems.Problem | None) -> None:
        self.outcomes = outcomes
        self.orders: list[Order] = []

    async def submit_many(self, orders: Sequence[Order], **_: Any) -> list[Accepted | problems.Problem]:
        self.orders = list(orders)
        answers = zip(orders, self.outcomes, strict=True)
        return [outcome or Accepted(order.task_id, replayed=False) for order, outcome in answers]


@pytest.fixture
def send(app: FastAPI, settings: Settings, client_of: ClientOf) -> Callable[..., Any]:
    """Send a batch to an application whose task service answers as given."""

    async def sending(tasks: Tasks, *values: Any, key: str = "k" * 16) -> httpx.Response:
        app.state.context = SimpleNamespace(settings=settings, tasks=tasks)
        app.state.live = None  # nobody waits
        async with client_of(app) as client:
            return await client.post("/api/async/batch", json={"tasks": values}, headers={"Idempotency-Key": key})

    return sending


async def test_results_are_in_the_order_of_the_rows(send: Callable[..., Any]):
    tasks = Tasks(None, problems.QueueFull(), None)
    answer = await send(tasks, GOOD, {}, GOOD, GOOD)
    assert answer.status_code == 202
    document = answer.json()
    assert (document["accepted"], document["refused"]) == (2, 2)
    results = document["results"]
    assert [row["status"] for row in results] == ["PENDING", 422, 503, "PENDING"]
    assert [results[0]["task_id"], results[3]["task_id"]] == [tasks.orders[0].task_id, tasks.orders[2].task_id]
    assert results[0]["status_url"] == f"/api/async/status/{results[0]['task_id']}"
    assert results[1].keys() == {"type", "title", "status", "detail", "errors"}
    assert results[2].keys() == {"type", "title", "status", "detail"}
    assert int(answer.headers["retry-after"]) >= 5  # of the full queue, not of polling


async def test_a_row_has_its_id_by_its_number_and_its_key(send: Callable[..., Any]):
    async def ids(*values: Any, key: str = "k" * 16) -> list[str]:
        tasks = Tasks(*[None for value in values if value])
        await send(tasks, *values, key=key)
        return [order.task_id for order in tasks.orders]

    one, two, three = await ids(GOOD, GOOD, GOOD)
    assert len({one, two, three}) == 3
    assert await ids(GOOD, {}, GOOD) == [one, three]
    assert not {one, two, three} & set(await ids(GOOD, GOOD, GOOD, key="l" * 16))
    # Neither does a key that ends in a digit meet the rows of another.
    assert not {*await ids(*[GOOD] * 12)} & {*await ids(*[GOOD] * 12, key="k" * 16 + "1")}


async def test_a_rows_digest_is_of_that_row_alone(send: Callable[..., Any]):
    tasks = Tasks(None, None, None)
    await send(tasks, GOOD, {"data": "y"}, {"task": "process", "data": "x"})
    first, second, third = [order.digest for order in tasks.orders]
    assert first == third != second


@pytest.mark.parametrize(
    ("outcomes", "status", "slug", "rows_told"),
    [
        ([problems.NotPublished(), problems.NotPublished()], 503, "not-published", False),
        ([problems.QueueFull(), problems.NotPublished()], 503, "queue-full", True),
        ([problems.InFlight(), problems.InFlight()], 409, "in-flight", False),
        ([problems.KeyReused(), problems.KeyReused()], 422, "key-reused", False),
        ([problems.KeyReused(), problems.Unavailable()], 503, "unavailable", True),
    ],
)
async def test_a_batch_of_which_nothing_was_taken(
    send: Callable[..., Any], outcomes: list[problems.Problem], status: int, slug: str, *, rows_told: bool
):
    answer = await send(Tasks(*outcomes), GOOD, GOOD)
    assert (answer.status_code, answer.json()["type"]) == (status, f"urn:problem:{slug}")
    assert ("retry-after" in answer.headers) == (status != 422)
    told = answer.json().get("errors")
    assert (told is not None) == rows_told
    if told is not None:
        assert [row["status"] for row in told] == [int(outcome.status) for outcome in outcomes]


async def test_what_may_pass_decides_over_what_never_will(send: Callable[..., Any]):
    answer = await send(Tasks(problems.NotPublished()), {}, GOOD)
    assert answer.status_code == 503
    assert [row["status"] for row in answer.json()["errors"]] == [422, 503]


async def test_a_batch_of_invalid_rows_tells_of_each(send: Callable[..., Any]):
    answer = await send(Tasks(), {}, {"data": 1})
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:problem:invalid")
    assert [row["errors"][0]["loc"] for row in answer.json()["errors"]] == [["data"], ["data"]]


@pytest.mark.parametrize("tasks", [[], [GOOD] * 1001, GOOD, None])
def test_a_batch_has_one_to_a_thousand_rows(tasks: Any):
    assert len(rows(*[GOOD] * 1000)) == 1000
    with pytest.raises(ValidationError, match="tasks"):
        Batch.model_validate({"tasks": tasks})


def test_the_document_tells_of_each_kind_of_row(app: FastAPI):
    schemas = app.openapi()["components"]["schemas"]
    offered = {row["$ref"].rpartition("/")[2] for row in schemas["Batch"]["properties"]["tasks"]["items"]["anyOf"]}
    # Tasks of one's own come on top.
    assert offered == {schema.__name__ for schema in SCHEMAS.values()} >= {"ProcessRow", "CountWordsRow"}
    assert "task" in schemas["CountWordsRow"]["required"]
    assert "task" not in schemas["ProcessRow"]["required"]
