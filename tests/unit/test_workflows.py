"""The definitions: what a request means, and that it means the same whoever asks."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import ValidationError

from app.contracts import CHUNKS_MAX, TASKS, Chunk, Dataset, Onboarding, Summaries
from app.engine.conductor import open_tasks
from app.engine.plan import opening
from app.engine.workflows import MEMBERS_MAX, Flow
from app.main import create_app
from app.settings import Settings
from app.tasks.dataset import aggregate, summarise_chunk, values
from app.workflows import DEFINITIONS, dataset, load, onboarding

PERSON = Onboarding(name="Ada", email="ada@example.com", laptop="large")
CHUNK = {"count": 1, "sum": 2, "min": 2, "max": 2, "histogram": [1]}


def test_every_definition_has_its_own_kind_and_schema():
    assert all(kind == definition.kind for kind, definition in DEFINITIONS.items())
    assert len({definition.request for definition in DEFINITIONS.values()}) == len(DEFINITIONS)


def test_onboarding_is_a_step_then_three_then_one():
    flow = Flow(onboarding.steps(PERSON))
    assert list(flow.steps) == ["account", "mailbox", "badge", "laptop", "welcome"]
    assert {name: set(flow.steps[name].after) for name in ("mailbox", "badge", "laptop")} == {
        "mailbox": {"account"},
        "badge": {"account"},
        "laptop": {"account"},
    }
    assert flow.before("welcome") == {"account", "mailbox", "badge", "laptop"}
    assert [name for name, step in flow.steps.items() if step.undo is None] == ["welcome"]


def test_the_payloads_of_onboarding_are_made_of_results_alone():
    results: dict[str, Any] = {"account": {"account": "ada@example.com"}}
    results |= {what: {"id": f"{what}-1"} for what in onboarding.PROVIDED}
    for _ in range(2):
        payloads = {step.name: step.payload(results) for step in onboarding.steps(PERSON)}
        assert payloads["laptop"].model_dump() == {
            "account": "ada@example.com", "what": "laptop", "model": "large", "seconds": 0,
        }  # fmt: skip
        assert payloads["welcome"].model_dump()["provided"]["badge"] == "badge-1"
    for step in onboarding.steps(PERSON):
        assert isinstance(step.payload(results), TASKS[step.task].payload)
        if step.undo is not None:
            undo = step.undo.payload({})
            assert isinstance(undo, TASKS[step.undo.task].payload)
            assert undo.model_dump()["what"] == step.name


@pytest.mark.parametrize(("rows", "chunk", "count"), [(100_000, 2_000, 50), (1, 1, 1), (10, 3, 4), (999, 1, 999)])
def test_the_chunks_of_a_data_set_have_each_row_once(rows: int, chunk: int, count: int):
    steps = dataset.steps(Dataset(rows=rows, chunk=chunk, seed=3))
    chunks = [step.payload({}) for step in steps[:-1]]
    assert len(chunks) == count
    assert len(Flow(steps).steps) <= MEMBERS_MAX
    seen: list[int] = []
    for one in chunks:
        assert isinstance(one, Chunk)
        seen += range(one.first, one.last)
    assert seen == list(range(rows))


@pytest.mark.parametrize("request_", [{"rows": CHUNKS_MAX + 1, "chunk": 1}, {"rows": 1_000_001}, {"chunk": 0}])
def test_a_data_set_of_too_many_chunks_is_refused(request_: dict[str, int]):
    with pytest.raises(ValidationError):
        Dataset(**request_)


def test_the_last_task_gets_the_summaries_in_the_order_of_rows():
    steps = dataset.steps(Dataset(rows=30, chunk=1))
    results = {f"chunk-{number:03}": {**CHUNK, "sum": number} for number in reversed(range(30))}
    payload = steps[-1].payload(results)
    assert isinstance(payload, Summaries)
    assert [one.sum for one in payload.chunks] == list(range(30))


def test_a_chunk_is_summarised_and_chunks_are_aggregated():
    every = list(values(5, 0, 100))
    halves = [summarise_chunk(payload={"seed": 5, "first": first, "last": first + 50}) for first in (0, 50)]
    whole = summarise_chunk(payload={"seed": 5, "first": 0, "last": 100})
    assert (whole["sum"], whole["min"], whole["max"]) == (sum(every), min(every), max(every))
    assert whole["histogram"] == [sum(value // 1000 == column for value in every) for column in range(10)]
    together = aggregate(payload={"chunks": halves})
    assert {name: together[name] for name in whole} == whole
    assert (together["chunks"], together["mean"]) == (2, round(sum(every) / 100, 3))


def test_other_modules_add_definitions():
    assert load(()) == DEFINITIONS
    assert load(("tests.integration.workflows",)).keys() >= {*DEFINITIONS, "test-trip"}


def test_the_document_of_a_new_workflow_has_all_its_members_and_nothing_open():
    flow = Flow(onboarding.steps(PERSON))
    members = opening(flow, lambda name: f"id-{name}")
    assert {one["status"] for one in members.values()} == {"WAITING"}
    assert members["badge"]["task_id"] == "id-badge"
    assert open_tasks({"members": members, "compensations": {}}) == []


@pytest.mark.usefixtures("restored_logging")
def test_every_definition_is_a_route_with_its_schema_and_takes_a_key(settings: Settings):
    app = create_app(settings.model_copy(update={"workflow_modules": ("tests.integration.workflows",)}))
    paths = app.openapi()["paths"]
    for kind in (*DEFINITIONS, "test-trip"):
        operation = paths[f"/api/workflows/{kind}"]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert schema.rpartition("/")[2] == load(("tests.integration.workflows",))[kind].request.__name__
        assert "idempotency-key" in {parameter["name"].lower() for parameter in operation["parameters"]}
        assert {"202", "422", "503"} <= operation["responses"].keys()


async def test_an_id_that_is_none_is_not_found(app: FastAPI, client_of: Callable[[Any], httpx.AsyncClient]):
    app.state.context = SimpleNamespace(workflows=SimpleNamespace(find=None))
    async with client_of(app) as client:
        answers = [await client.request(method, "/api/workflows/x") for method in ("GET", "DELETE")]
    assert [answer.status_code for answer in answers] == [404, 404]
