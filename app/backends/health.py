"""The health of a service, in the API's words."""

from typing import Any

from fastapi import APIRouter, Request, Response

from app import problems
from app.api.health import UNHEALTHY, HealthCheck
from app.models import Health

router = APIRouter(tags=["health"])


@router.get("/", include_in_schema=False)
async def root(request: Request) -> dict[str, Any]:
    """Where things are."""
    prefix = request.scope["root_path"]
    return {"status": "ok", "docs": f"{prefix}/docs", "health": f"{prefix}/health"}


@router.get("/health/live")
async def live() -> dict[str, str]:
    """Whether this process turns: nothing else is asked."""
    return {"status": "ok"}


@router.get("/health", responses=UNHEALTHY)
async def health(request: Request, response: Response) -> Health:
    """Which servers answer; 503 without MongoDB, which every call needs. What waits for the others is done later."""
    check: HealthCheck = request.app.state.health
    answer = await check()
    if answer.status == "unhealthy":
        response.status_code = 503
        response.headers["Retry-After"] = str(problems.jittered(2))
    response.headers["Cache-Control"] = "no-store"
    return answer
