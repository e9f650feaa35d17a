"""Workflows: each ends as its definition says, whatever happens on the way."""

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx
import pymongo
import pytest

from app.tasks.dataset import values
from tests.integration.harness import Stack, wait_until

pytestmark = pytest.mark.integration

ENDED = {"SUCCESS", "FAILURE", "CANCELLED"}


@pytest.fixture
def database(stack: Stack) -> Iterator[Any]:
    with pymongo.MongoClient(stack.settings.mongodb_url.get_secret_value()) as client:
        yield client["stack"]


def begin(api: httpx.Client, kind: str, **request: Any) -> str:
    answer = api.post(f"/api/workflows/{kind}", json=request)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == answer.json()["status_url"]
    return answer.json()["workflow_id"]


def look(api: httpx.Client, workflow_id: str) -> dict[str, Any]:
    return api.get(f"/api/workflows/{workflow_id}").raise_for_status().json()


def ended(api: httpx.Client, workflow_id: str, seconds: float = 30) -> dict[str, Any]:
    def done() -> dict[str, Any] | None:
        document = look(api, workflow_id)
        return document if document["status"] in ENDED else None

    return wait_until(done, seconds)


def newcomer(**fields: Any) -> dict[str, Any]:
    return {"name": "Ada", "email": f"{uuid4().hex}@example.com", **fields}


def states(tasks: dict[str, Any]) -> dict[str, str]:
    return {name: one["status"] for name, one in tasks.items()}


STEPS = ("account", "mailbox", "badge", "laptop", "welcome")


def test_onboarding_gives_a_newcomer_everything_once(api: httpx.Client, database: Any) -> None:
    request = newcomer()
    document = ended(api, begin(api, "onboarding", **request))
    assert document["status"] == "SUCCESS", document
    assert states(document["members"]) == dict.fromkeys(STEPS, "SUCCESS")
    assert document["compensations"] == {}
    assert document["progress"] == {"current": 5, "total": 5, "progress": 100.0}
    person = database["newcomers"].find_one({"_id": request["email"]})
    assert sorted(person["log"]) == ["badge", "laptop", "mail", "mailbox"]
    provided = {what: person["provided"][what] for what in ("mailbox", "badge", "laptop")}
    assert document["result"] == {"account": request["email"], **provided}


def test_a_data_set_is_summarised_in_chunks(api: httpx.Client) -> None:
    document = ended(api, begin(api, "dataset", rows=100_000, seed=7), 60)
    assert document["status"] == "SUCCESS", document["error"]
    every = list(values(7, 0, 100_000))
    histogram = [sum(value // 1000 == column for value in every) for column in range(10)]
    assert document["result"] == {
        "chunks": 50, "count": 100_000, "sum": sum(every), "mean": round(sum(every) / 100_000, 3),
        "min": min(every), "max": max(every), "histogram": histogram,
    }  # fmt: skip
    assert document["progress"]["total"] == 51
