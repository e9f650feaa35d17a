"""Health: what containers, balancers and people look at."""

import asyncio
import time
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request, Response

from app import problems
from app.api.dependencies import LiveDep
from app.context import Context
from app.models import Health

router = APIRouter(tags=["health"])

UNHEALTHY: dict[int | str, dict[str, Any]] = {503: {"model": Health, "description": "Nothing can be served"}}


class HealthCheck:
    """Asks the servers at most once in HEALTH_CACHE seconds, however many probes come.

    Items need MongoDB, tasks need Redis: with either of these `vital` ones the API has something to serve.
    """

    def __init__(self, context: Context, *, vital: Collection[str] = ("mongodb", "redis")) -> None:
        self._context = context
        self._vital = vital
        self._lock = asyncio.Lock()
        self._until = 0.0
        self._health: Health | None = None

    async def __call__(self) -> Health:
        """The health of a moment ago, or of now."""
        async with self._lock:
            if self._health is None or time.monotonic() >= self._until:
                self._health = judge(await self._context.services(), self._vital)
                self._until = time.monotonic() + self._context.settings.health_cache
            return self._health


def judge(services: dict[str, bool], vital: Collection[str]) -> Health:
    """The health that follows from which servers answer; without all of the `vital` ones nothing can be served."""
    if all(services.values()):
        status = "healthy"
    elif any(services[name] for name in vital):
        status = "degraded"
    else:
        status = "unhealthy"
    words = {name: "connected" if answers else "disconnected" for name, answers in services.items()}
    return Health.model_validate({"status": status, "timestamp": datetime.now(UTC), "services": words})


@router.get("/", include_in_schema=False)
async def root() -> dict[str, Any]:
    """Where things are."""
    return {
        "status": "ok",
        "docs": "/docs",
        "openapi": "/openapi.json",
        "health": "/health",
        "items": "/api/items",
        "process": "/api/async/process",
    }


@router.get("/health/live")
async def live() -> dict[str, str]:
    """Whether this process turns: nothing else is asked."""
    return {"status": "ok"}


@router.get("/health/ready", responses=UNHEALTHY)
@router.get("/health", responses=UNHEALTHY)
async def health(request: Request, response: Response, live: LiveDep) -> Health:
    """Which servers answer; 503 only when nothing can be served, so that one that is away takes no replica out.

    `/health/ready` is 503 too once this replica has been told to stop.
    """
    check: HealthCheck = request.app.state.health
    answer = await check()
    if live.draining and request.url.path == "/health/ready":
        answer = answer.model_copy(update={"status": "draining"})
    if answer.status in {"unhealthy", "draining"}:
        response.status_code = 503
        response.headers["Retry-After"] = str(problems.jittered(2))
    response.headers["Cache-Control"] = "no-store"
    return answer
