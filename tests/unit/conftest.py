import logging
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import structlog
from fastapi import FastAPI

from app.main import create_app
from app.settings import Settings


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable of ours is set, whatever the shell that runs the tests has."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


@pytest.fixture
def read_settings(clean_environment: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Read settings from the environment given here, and from nothing else unless it is named."""

    def read(env_file: Any = None, secrets_dir: Any = None, **environment: str) -> Settings:
        for name, value in environment.items():
            clean_environment.setenv(name, value)
        return Settings(_env_file=env_file, _secrets_dir=secrets_dir)

    return read


@pytest.fixture
def settings(read_settings: Callable[..., Settings]) -> Settings:
    """The defaults."""
    return read_settings()


@pytest.fixture
def restored_logging() -> Iterator[None]:
    """`configure_logging` changes the process; pytest's own handlers must come back."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


@pytest.fixture
def app(settings: Settings, restored_logging: None) -> FastAPI:  # noqa: ARG001  wanted for what it undoes
    """The application, without its lifespan: no client is open."""
    return create_app(settings)


@pytest.fixture
def client_of() -> Callable[[Any], httpx.AsyncClient]:
    """Make a client of an ASGI application; what the application raises has been answered by then."""

    def make(app: Any) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://api.test")

    return make
