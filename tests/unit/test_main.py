import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.exceptions import HTTPException

from app import problems
from app.settings import Settings

ROOT = Path(__file__).parents[2]
JSON = {"Content-Type": "application/json"}
ClientOf = Callable[[Any], httpx.AsyncClient]

METHODS = {"get", "put", "post", "patch", "delete"}

# Imports the application and makes one in a process of its own, where nothing else has been imported.
PROGRAM = """
import importlib, json, pkgutil, socket, sys

def refuse(*arguments, **options):
    raise AssertionError("I/O at import or assembly")

socket.getaddrinfo = refuse
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
import app.api, app.main
document = app.main.create_app().openapi()
for module in pkgutil.iter_modules(app.api.__path__, "app.api."):
    importlib.import_module(module.name)
print(json.dumps({"modules": list(sys.modules), "document": document}))
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The modules that the application loads, and its OpenAPI document; made where no server can be reached."""
    ours = {name.upper() for name in Settings.model_fields}
    environment = {name: value for name, value in os.environ.items() if name.upper() not in ours}
    program = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        env={**environment, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path_factory.mktemp("empty"),  # without the .env of whoever runs the tests
        capture_output=True,
        text=True,
        check=False,
    )
    assert program.returncode == 0, program.stderr
    return json.loads(program.stdout)


@pytest.fixture
def operations(fresh: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the document says of each method and path."""
    return {
        f"{method.upper()} {path}": operation
        for path, item in fresh["document"]["paths"].items()
        for method, operation in item.items()
        if method in METHODS
    }


def test_the_api_imports_neither_tasks_nor_the_celery_app(fresh: dict[str, Any]):
    forbidden = ("app.tasks", "app.celery_app", "app.worker", "app.engine.task", "app.engine.backend")
    assert not [name for name in fresh["modules"] if name.startswith(forbidden)]
    assert "app.api.items" in fresh["modules"]


async def test_an_application_without_its_servers_lives(app: FastAPI, client_of: Callable[[Any], httpx.AsyncClient]):
    async with client_of(app) as client:
        response = await client.get("/health/live")
    assert response.json() == {"status": "ok"}


def test_the_document_lists_the_api(operations: dict[str, Any]):
    # Routes of one's own come on top.
    assert set(operations) >= {
        "GET /health",
        "GET /health/live",
        "GET /health/ready",
        "GET /api/items",
        "POST /api/items",
        "GET /api/items/{item_id}",
        "PUT /api/items/{item_id}",
        "PATCH /api/items/{item_id}",
        "DELETE /api/items/{item_id}",
        "POST /api/async/process",
        "POST /api/async/count-words",
        "POST /api/async/batch",
        "GET /api/async/status/{task_id}",
        "GET /api/async/tasks/{task_id}",
        "GET /api/async/tasks/{task_id}/stream",
        "DELETE /api/async/tasks/{task_id}",
    }


def test_a_stream_is_documented_as_events(operations: dict[str, Any]):
    stream = operations["GET /api/async/tasks/{task_id}/stream"]
    assert list(stream["responses"]["200"]["content"]) == ["text/event-stream"]
    assert {"204", "404", "503"} <= stream["responses"].keys()
    assert "last-event-id" in {parameter["name"] for parameter in stream["parameters"]}


def test_whatever_makes_or_tells_of_a_task_can_wait_for_it(operations: dict[str, Any]):
    assert {
        name
        for name, operation in operations.items()
        if any(parameter["name"] == "prefer" for parameter in operation.get("parameters", []))
    } >= {
        "GET /api/async/status/{task_id}",
        "GET /api/async/tasks/{task_id}",
        *(name for name in operations if name.startswith("POST /api/async/")),
    }


def test_every_route_documents_invalid_requests_as_our_problem(operations: dict[str, Any]):
    for name, operation in operations.items():
        content = operation["responses"]["422"]["content"]
        assert content == {problems.MEDIA_TYPE: {"schema": problems.SCHEMA}}, name


def test_every_documented_error_is_a_problem(operations: dict[str, Any]):
    for name, operation in operations.items():
        for status, response in operation["responses"].items():
            # /health says which servers are away, also where that is bad news.
            if status >= "400" and not (status == "503" and "/health" in name):
                assert list(response["content"]) == [problems.MEDIA_TYPE], (name, status)


def test_the_frameworks_own_error_schema_is_nowhere(fresh: dict[str, Any]):
    assert "ValidationError" not in json.dumps(fresh["document"])


def test_creates_take_an_idempotency_key(operations: dict[str, Any]):
    assert {
        name
        for name, operation in operations.items()
        if any(parameter["name"] == "idempotency-key" for parameter in operation.get("parameters", []))
    } >= {"POST /api/items", *(name for name in operations if name.startswith("POST /api/async/"))}


async def test_the_pages_load_nothing_from_elsewhere(app: FastAPI, client_of: Callable[[Any], httpx.AsyncClient]):
    async with client_of(app) as client:
        pages = [await client.get(path) for path in ("/docs", "/redoc")]
    for page in pages:
        assert page.status_code == 200
        assert not re.search(r"""(?:src|href)\s*=\s*["'](?:https?:)?//""", page.text)


@pytest.fixture
def ready(app: FastAPI, settings: Settings) -> FastAPI:
    """The application with as much of a context as refusals need."""
    app.state.context = SimpleNamespace(settings=settings)
    return app


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/api/items", "GET, POST"),
        ("POST", "/api/items/x", "DELETE, GET, PATCH, PUT"),
        ("PUT", "/api/async/tasks/x", "DELETE, GET"),
    ],
)
async def test_405_names_every_method_of_the_path(
    app: FastAPI, client_of: ClientOf, method: str, path: str, allowed: str
):
    async with client_of(app) as client:
        response = await client.request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allowed)


async def test_a_long_list_of_errors_is_cut(ready: FastAPI, client_of: ClientOf):
    async with client_of(ready) as client:
        response = await client.post("/api/items", json={f"field {number}": 0 for number in range(5000)})
    assert response.status_code == 422
    assert len(response.json()["errors"]) == 20


async def test_a_body_of_another_media_type_is_415(ready: FastAPI, client_of: ClientOf):
    async with client_of(ready) as client:
        response = await client.post("/api/items", content=b'{"name": "x"}', headers={"Content-Type": "text/plain"})
    assert response.status_code == 415
    assert response.json()["type"] == "urn:problem:unsupported-media-type"


@pytest.mark.parametrize("depth", [10, 5000])
async def test_a_patch_that_is_nested_too_deep_is_refused(ready: FastAPI, client_of: ClientOf, depth: int):
    body = b'{"a":' * depth + b"1" + b"}" * depth
    async with client_of(ready) as client:
        response = await client.patch(
            "/api/items/" + "0" * 24, content=body, headers={"Content-Type": "application/json"}
        )
    assert response.status_code in (400, 422)


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def test_bodies_are_bounded_told_or_not(ready: FastAPI, client_of: ClientOf):
    part = b"x" * 600_000
    async with client_of(ready) as client:
        told = await client.post("/api/items", content=2 * part, headers=JSON)
        chunked = await client.post(
            "/api/items", content=chunks(part, part), headers={"Content-Type": "application/json"}
        )
    for response in (told, chunked):
        assert response.status_code == 413
        assert response.json()["type"] == "urn:problem:body-too-large"
        assert response.headers["x-request-id"] == response.json()["request_id"]


async def test_any_status_of_the_framework_is_a_problem(app: FastAPI, client_of: ClientOf):
    @app.get("/forbidden")
    async def forbidden() -> None:
        raise HTTPException(403)

    async with client_of(app) as client:
        response = await client.get("/forbidden")
    assert (response.status_code, response.json()["type"]) == (403, "urn:problem:forbidden")


def test_ready_documents_what_it_answers(app: FastAPI):
    paths = app.openapi()["paths"]
    answers = [paths[path]["get"]["responses"]["503"]["content"] for path in ("/health", "/health/ready")]
    assert answers[0] == answers[1]
