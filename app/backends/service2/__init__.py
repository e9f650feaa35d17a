"""Fulfilment, behind the gateway."""

from fastapi import FastAPI

from app.backends.assembly import assemble
from app.settings import Settings, get_settings


def create_app(settings: Settings | None = None) -> FastAPI:
    """An application over `settings` (the environment's by default)."""
    return assemble(settings or get_settings(), name="service2", title="Fulfilment", routers=[])
