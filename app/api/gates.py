"""What every request passes before it is routed, the same for the API and for the services behind the gateway."""

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from app.api.access import Access
from app.api.admission import Admission
from app.api.edge import Edge
from app.api.errors import METHODS
from app.settings import Settings

# What pages of other origins may send and read beside what every page may (CORS).
SENT = ("Authorization", "Content-Type", "Idempotency-Key", "If-Match", "If-None-Match", "Prefer", "X-Request-ID")
READ = (
    *("ETag", "Idempotent-Replayed", "Link", "Location", "RateLimit", "RateLimit-Policy", "Retry-After"),
    *("WWW-Authenticate", "X-Request-ID"),
)


def guard(app: FastAPI, settings: Settings) -> None:
    """Put request ids, log line, CORS, bounds, API keys and quotas before `app`; its lifespan gives `state.context`."""
    # Last added is outermost: Edge must see the real peer before the forwarding headers are believed, and a replica
    # that has too much to do must not look keys up.
    app.add_middleware(Access, settings=settings)
    app.add_middleware(Admission, limit=settings.concurrency_max)
    if settings.cors_origins:
        # Keys travel in a header of their own, so no origin ever needs credentials that a browser adds by itself.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=METHODS,
            allow_headers=SENT,
            expose_headers=READ,
        )
    app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=list(settings.trusted_proxies))
    app.add_middleware(Edge, trusted=settings.trusted_proxies, body_max=settings.body_max_bytes)
