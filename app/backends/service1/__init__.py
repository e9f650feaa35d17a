"""Orders, behind the gateway."""

from fastapi import FastAPI

from app.backends.assembly import assemble
from app.backends.service1 import events, orders
from app.contracts import Service
from app.settings import Settings, get_settings


def create_app(settings: Settings | None = None) -> FastAPI:
    """An application over `settings` (the environment's by default); its lifespan takes part in events."""
    return assemble(
        settings or get_settings(),
        name="service1",
        title="Orders",
        routers=[orders.router],
        events=Service.ORDERS,
        on=events.on,
    )
