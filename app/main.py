"""The API: assembly only. `uvicorn app.main:create_app --factory`."""

import gc
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from app import problems
from app.api import (
    access,
    batch,
    breakers,
    dead_letters,
    errors,
    events,
    gateway,
    health,
    items,
    jobs,
    processing,
    schedules,
    tasks,
    workflows,
)
from app.api.gates import guard
from app.context import open_context
from app.settings import Settings, get_settings
from app.telemetry import configure_logging
from app.watchman import watched
from app.workflows import load

DESCRIPTION = "Items are answered at once; slow work is accepted, done by workers, and polled or watched."
SOCKETS = 2048  # open at a time, beside those of clients that wait: requests and connections to servers


def _allow_sockets(count: int) -> None:
    # Many systems start a process with room for 1,024 and let it ask for more.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def create_app(settings: Settings | None = None) -> FastAPI:
    """An application over `settings` (the environment's by default); connections are opened by its lifespan."""
    settings = settings or get_settings()
    configure_logging(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with (
            open_context(settings, service="api") as context,
            context.live() as live,
            gateway.watch(settings) as app.state.gateway,
        ):
            app.state.context = context
            app.state.live = live
            _allow_sockets(settings.watchers_max + SOCKETS)
            app.state.health = health.HealthCheck(context)
            app.openapi()  # a tenth of a second, which must not be the first reader's and of all who wait beside it
            # What startup made stays: to go through all of it again and again held the loop for 65 ms each time.
            gc.collect()
            gc.freeze()
            async with watched(settings.loop_block_warning):
                yield {"drain": live.drain}  # for OneWriteProtocol

    app: FastAPI = FastAPIOffline(
        title="Concurrent API stack",
        description=DESCRIPTION,
        version="0.1.0",
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect would repeat whatever Host the client sent
        responses={422: problems.example(problems.Invalid), 503: problems.example(problems.Unavailable)},
    )
    for module in (health, items, processing, batch, tasks, dead_letters, jobs, schedules, events, gateway, breakers):
        # Here rather than for the whole application, whose bound answers in plain text, outside of Edge.
        app.include_router(module.router, max_body_size=settings.body_max_bytes)
    app.include_router(workflows.create_router(load(settings.workflow_modules)), max_body_size=settings.body_max_bytes)
    app.include_router(jobs.router, prefix="/api", max_body_size=settings.body_max_bytes)
    errors.install(app)
    access.document(app, required=settings.api_keys_required)
    guard(app, settings)
    return app
