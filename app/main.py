"""The API: assembly only. `uvicorn app.main:create_app --factory`."""

import gc
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from app import problems
from app.api import access, batch, breakers, dead_letters, errors, health, items, processing, tasks, workflows
from app.api.admission import Admission
from app.api.edge import Edge
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


# What pages of other origins may send and read beside what every page may (CORS).
SENT = ("Authorization", "Content-Type", "Idempotency-Key", "If-Match", "If-None-Match", "Prefer", "X-Request-ID")
READ = (
    *("ETag", "Idempotent-Replayed", "Link", "Location", "RateLimit", "RateLimit-Policy", "Retry-After"),
    *("WWW-Authenticate", "X-Request-ID"),
)


def create_app(settings: Settings | None = None) -> FastAPI:
    """An application over `settings` (the environment's by default); connections are opened by its lifespan."""
    settings = settings or get_settings()
    configure_logging(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with open_context(settings, service="api") as context, context.live() as live:
            app.state.context = context
            app.state.live = live
            _allow_sockets(settings.watchers_max + SOCKETS)
            app.state.health = health.HealthCheck(context)
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
    for module in (health, items, processing, batch, tasks, dead_letters, breakers):
        # Here rather than for the whole application, whose bound answers in plain text, outside of Edge.
        app.include_router(module.router, max_body_size=settings.body_max_bytes)
    app.include_router(workflows.create_router(load(settings.workflow_modules)), max_body_size=settings.body_max_bytes)
    errors.install(app)
    access.document(app, required=settings.api_keys_required)
    # Last added is outermost: Edge must see the real peer before the forwarding headers are believed, and a replica
    # that has too much to do must not look keys up.
    app.add_middleware(access.Access, settings=settings)
    app.add_middleware(Admission, limit=settings.concurrency_max)
    if settings.cors_origins:
        # Keys travel in a header of their own, so no origin ever needs credentials that a browser adds by itself.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=errors.METHODS,
            allow_headers=SENT,
            expose_headers=READ,
        )
    app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=list(settings.trusted_proxies))
    app.add_middleware(Edge, trusted=settings.trusted_proxies, body_max=settings.body_max_bytes)
    return app
