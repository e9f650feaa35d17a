"""The outside world of the examples: what tasks call over HTTP. Replace it by what yours call.

One application with a router each for the stock, shipping, payment, tax, mail, address and fraud services. What
changes something takes an `Idempotency-Key`: done once however often it is asked for, and never once it was taken back.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from app.backends.outside import checks, conduct, errors, inventory, mail, payment, shipping, world
from app.context import open_database
from app.settings import Settings, get_settings
from app.telemetry import configure_logging


def create_app(settings: Settings | None = None) -> FastAPI:
    """An application over `settings` (the environment's by default); MongoDB is opened by its lifespan."""
    settings = settings or get_settings()
    configure_logging(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_database(settings, name="outside") as database:
            app.state.world = world.World(database, settings)
            yield

    app = FastAPI(title="Outside world", lifespan=lifespan, redirect_slashes=False)
    for module in (world, inventory, shipping, payment, mail, checks):
        app.include_router(module.router, max_body_size=conduct.BODY_MAX)
    if settings.environment == "development":
        # Whoever may make a service fail must not meet one that matters.
        app.include_router(conduct.router, max_body_size=conduct.BODY_MAX)
    errors.install(app)
    app.state.conducts = {name: conduct.Conduct() for name in conduct.ROUTERS}
    app.add_middleware(conduct.Conducted, conducts=app.state.conducts)
    app.add_middleware(errors.Numbered)
    return app
