"""The services behind the gateway, without their servers."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from app.api.health import HealthCheck
from app.backends import service1, service2
from app.settings import Settings

ROOT = Path(__file__).parents[2]
SERVICES = {"service1": service1.create_app, "service2": service2.create_app}
ClientOf = Callable[[Any], httpx.AsyncClient]

PROGRAM = """
import importlib, json, sys
app = importlib.import_module(f"app.backends.{sys.argv[1]}").create_app()
print(json.dumps({"modules": list(sys.modules), "document": app.openapi()}))
"""


@pytest.fixture(params=SERVICES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def app(name: str, settings: Settings, restored_logging: None) -> Any:  # noqa: ARG001  wanted for what it undoes
    """The application, without its lifespan."""
    return SERVICES[name](settings)


class Servers:
    """A context of which only the servers' answers are asked."""

    def __init__(self, settings: Settings, **answers: bool) -> None:
        self.settings, self.answers = settings, answers

    async def services(self) -> dict[str, bool]:
        return {"mongodb": True, "redis": True, "rabbitmq": True} | self.answers


def test_a_service_names_tasks_and_never_imports_one(name: str, tmp_path: Path):
    ours = {field.upper() for field in Settings.model_fields}
    environment = {key: value for key, value in os.environ.items() if key.upper() not in ours}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, name],
        env={**environment, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    forbidden = (
        "app.tasks",
        "app.celery_app",
        "app.worker",
        "app.engine.task",
        "celery.app",
        "celery.worker",
    )
    assert not [module for module in told["modules"] if module.startswith(forbidden)]
    assert {"/health", "/health/live"} <= told["document"]["paths"].keys()


@pytest.mark.parametrize(
    ("away", "status", "code"),
    [
        ((), "healthy", 200),
        (("rabbitmq",), "degraded", 200),
        (("redis",), "degraded", 200),
        (("mongodb",), "unhealthy", 503),
    ],
)
async def test_health_says_what_is_missing(  # noqa: PLR0913, PLR0917
    app: Any, client_of: ClientOf, settings: Settings, away: tuple[str, ...], status: str, code: int
):
    servers = Servers(settings, **dict.fromkeys(away, False))
    app.state.health = HealthCheck(servers, vital=("mongodb",))
    async with client_of(app) as client:
        answer = await client.get("/health")
        alive = await client.get("/health/live")
    assert (answer.status_code, answer.json()["status"]) == (code, status)
    said = answer.json()["services"]
    assert said == {one: "disconnected" if one in away else "connected" for one in ("mongodb", "redis", "rabbitmq")}
    assert ("retry-after" in answer.headers) == (code == 503)
    assert alive.json() == {"status": "ok"}


async def test_problems_tell_the_path_that_clients_know(name: str, app: Any, client_of: ClientOf):
    async with client_of(app) as client:
        answers = [await client.get(path) for path in ("/nowhere", f"/api/{name}/nowhere")]
    for answer in answers:
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["instance"] == f"/api/{name}/nowhere"
        assert answer.json()["request_id"] == answer.headers["x-request-id"]


async def test_a_service_asks_for_api_keys_as_the_api_does(name: str, settings: Settings, client_of: ClientOf):
    guarded = SERVICES[name](settings.model_copy(update={"api_keys_required": True}))
    guarded.state.health = HealthCheck(Servers(settings))
    async with client_of(guarded) as client:
        assert (await client.get("/nowhere")).status_code == 401
        assert (await client.get("/health")).status_code == 200


async def test_a_service_bounds_bodies_and_requests(name: str, settings: Settings, client_of: ClientOf):
    small = SERVICES[name](settings.model_copy(update={"body_max_bytes": 100, "concurrency_max": 1}))
    async with client_of(small) as client:
        answer = await client.post("/anything", content=b"x" * 101)
    assert (answer.status_code, answer.json()["type"]) == (413, "urn:problem:body-too-large")


async def test_documentation_is_found_behind_the_gateway(name: str, app: Any, client_of: ClientOf):
    async with client_of(app) as client:
        page = (await client.get("/docs")).text
        # API keys need no redirect.
        links = set(re.findall(r"""["'](/[^"']+)["']""", page)) - {"/docs/oauth2-redirect"}
        assert f"/api/{name}/openapi.json" in links
        for link in links:
            assert link.startswith(f"/api/{name}/"), link
            assert (await client.get(link.removeprefix(f"/api/{name}"))).status_code == 200, link


async def test_links_at_the_root_lead_somewhere(name: str, app: Any, settings: Settings, client_of: ClientOf):
    app.state.health = HealthCheck(SimpleNamespace(services=Servers(settings).services, settings=settings))
    async with client_of(app) as client:
        told = (await client.get("/")).json()
        assert told.pop("status") == "ok"
        for link in told.values():
            assert (await client.get(link.removeprefix(f"/api/{name}"))).status_code == 200
