from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, Field
from pymongo.errors import AutoReconnect, PyMongoError, ServerSelectionTimeoutError
from redis.exceptions import BusyLoadingError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from starlette.exceptions import HTTPException

from app import problems
from app.api import errors
from app.api.edge import Edge

JSON = {"Content-Type": "application/json"}


class Note(BaseModel):
    pin: int = Field(le=10)


RAISED: dict[str, Exception] = {
    "problem": problems.Conflict("Not now.", retry_after=4),
    "bare": HTTPException(404),
    "unknown": RuntimeError("kept to ourselves"),
    "redis": RedisError("kept to ourselves"),
    "redis-connection": RedisConnectionError("kept to ourselves"),
    "redis-loading": BusyLoadingError("kept to ourselves"),
    "mongodb": PyMongoError("kept to ourselves"),
    "mongodb-selection": ServerSelectionTimeoutError("kept to ourselves"),
    "mongodb-reconnect": AutoReconnect("kept to ourselves"),
}


@pytest.fixture
async def client(client_of: Callable[[Any], httpx.AsyncClient]) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application that fails in every way."""
    app = FastAPI(openapi_url=None)
    errors.install(app)
    app.add_middleware(Edge, trusted=(), body_max=1_000_000)

    @app.get("/raise/{name}")
    async def fail(name: str) -> None:
        raise RAISED[name]

    @app.post("/notes/{number}")
    async def note(number: int, body: Note) -> None:
        """Take a note."""

    async with client_of(app) as client:
        yield client


def problem_of(response: httpx.Response, *, status: int, slug: str) -> dict[str, Any]:
    """The problem that a response tells of, checked for what all have."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store"
    document = response.json()
    assert document["status"] == status
    assert document["type"] == f"urn:problem:{slug}"
    assert document["instance"] == response.request.url.path
    assert response.headers.get_list("x-request-id") == [document["request_id"]]
    return document


async def test_a_problem_is_rendered(client: httpx.AsyncClient):
    response = await client.get("/raise/problem", headers={"X-Request-ID": "r-1"})
    document = problem_of(response, status=409, slug="conflict")
    assert document["detail"] == "Not now."
    assert document["request_id"] == "r-1"
    assert response.headers["retry-after"] in {"4", "5", "6"}


async def test_an_invalid_request_is_told_what_is_wrong_and_not_what_it_sent(client: httpx.AsyncClient):
    response = await client.post("/notes/x-ray", json={"pin": 271828})
    document = problem_of(response, status=422, slug="invalid")
    assert [row["loc"] for row in document["errors"]] == [["path", "number"], ["body", "pin"]]
    assert [row["type"] for row in document["errors"]] == ["int_parsing", "less_than_equal"]
    assert all(row.keys() == {"loc", "msg", "type"} for row in document["errors"])
    assert "271828" not in response.text
    assert "x-ray" not in response.text.replace(document["instance"], "")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"pin":', 400),
        (b'{"pin":\xff}', 400),
        (b'{"pin":' + b"1" * 5000 + b"}", 400),  # more digits than Python reads
        (b"[" * 100_000, 400),
        (b"", 422),
        (b"[]", 422),
        (b'{"pin":NaN}', 422),
        (b'{"\\ud800":1}', 422),  # a field's name comes from the client, and need not be text
    ],
)
async def test_a_body_that_cannot_be_read_is_the_clients_error(client: httpx.AsyncClient, body: bytes, status: int):
    response = await client.post("/notes/1", content=body, headers=JSON)
    problem_of(response, status=status, slug={400: "bad-request", 422: "invalid"}[status])


async def test_broken_json_is_malformed(client: httpx.AsyncClient):
    response = await client.post("/notes/1", content=b'{"pin":', headers=JSON)
    assert problem_of(response, status=400, slug="bad-request")["detail"] == "The body is not valid JSON."


async def test_an_unknown_path_is_not_found(client: httpx.AsyncClient):
    problem_of(await client.get("/nowhere"), status=404, slug="not-found")
    problem_of(await client.get("/raise/bare"), status=404, slug="not-found")


async def test_another_method_is_told_which_are_allowed(client: httpx.AsyncClient):
    response = await client.put("/notes/1")
    problem_of(response, status=405, slug="method-not-allowed")
    assert response.headers["allow"] == "POST"


async def test_an_unknown_error_is_ours_and_says_nothing_of_itself(client: httpx.AsyncClient):
    response = await client.get("/raise/unknown", headers={"X-Request-ID": "r-1"})
    document = problem_of(response, status=500, slug="internal")
    assert document["request_id"] == "r-1"
    assert "kept to ourselves" not in response.text
    assert "retry-after" not in response.headers


@pytest.mark.parametrize("name", [name for name in RAISED if name.startswith(("redis", "mongodb"))])
async def test_a_server_that_is_away_is_unavailable(client: httpx.AsyncClient, name: str):
    response = await client.get(f"/raise/{name}")
    document = problem_of(response, status=503, slug="unavailable")
    assert document["detail"].startswith("Redis" if "redis" in name else "MongoDB")
    assert "kept to ourselves" not in response.text
    assert response.headers["retry-after"] in {"2", "3"}
