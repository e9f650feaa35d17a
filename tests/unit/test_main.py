import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app import problems
from app.settings import Settings

ROOT = Path(__file__).parents[2]
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
    assert set(operations) == {
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
        "GET /api/async/status/{task_id}",
        "GET /api/async/tasks/{task_id}",
        "DELETE /api/async/tasks/{task_id}",
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
    } == {"POST /api/items", "POST /api/async/process", "POST /api/async/count-words"}


async def test_the_pages_load_nothing_from_elsewhere(app: FastAPI, client_of: Callable[[Any], httpx.AsyncClient]):
    async with client_of(app) as client:
        pages = [await client.get(path) for path in ("/docs", "/redoc")]
    for page in pages:
        assert page.status_code == 200
        assert not re.search(r"""(?:src|href)\s*=\s*["'](?:https?:)?//""", page.text)
