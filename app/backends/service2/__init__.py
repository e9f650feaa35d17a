"""Fulfilment, behind the gateway."""

from fastapi import FastAPI

from app.backends.assembly import assemble
from app.backends.service2 import events, fulfilments
from app.contracts import Service
from app.settings import Settings, get_settings


def create_app(settings: Settings | None = None) -> FastAPI:
    """An application over `settings` (the environment's by default); its lifespan takes part in events."""
    return assemble(
        settings or get_settings(),
        name="service2",
        title="Fulfilment",
        routers=[fulfilments.router],
        events=Service.FULFILMENT,
        on=events.on,
    )
