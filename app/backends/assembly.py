"""What the services behind the gateway have in common: each is an application that starts and serves alone."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from fastapi_offline import FastAPIOffline

from app import problems
from app.api import access, errors
from app.api.gates import guard
from app.api.health import HealthCheck
from app.api.paths import Mounted
from app.backends import health
from app.context import open_context
from app.contracts import Service
from app.engine.events import Handlers
from app.settings import Settings
from app.telemetry import configure_logging
from app.watchman import watched


def assemble(
    settings: Settings,
    *,
    name: str,
    title: str,
    routers: Sequence[APIRouter],
    events: Service,
    on: Handlers,
) -> FastAPI:
    """The application of the service `name`, found at `/api/{name}`; `on` handles what waits in the queue of `events`.

    Guarded like the API: request ids, API keys, quotas and bounds are the same, and so are problems. Connections are
    opened by its lifespan.
    """
    configure_logging(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # Each of a few processes does with few connections, opened as they are needed.
        small = settings.model_copy(update={"mongodb_pool_min": 0})
        async with (
            open_context(small, service=name) as context,
            watched(settings.loop_block_warning),
            context.subscriber(events, on),
        ):
            app.state.context = context
            app.state.health = HealthCheck(context, vital=("mongodb",))
            yield

    app: FastAPI = FastAPIOffline(
        title=title,
        version="0.1.0",
        lifespan=lifespan,
        redirect_slashes=False,
        responses={422: problems.example(problems.Invalid), 503: problems.example(problems.Unavailable)},
    )
    for router in (health.router, *routers):
        app.include_router(router, max_body_size=settings.body_max_bytes)
    errors.install(app)
    access.document(app, required=settings.api_keys_required)
    guard(app, settings)
    app.add_middleware(Mounted, prefix=f"/api/{name}")
    return app
