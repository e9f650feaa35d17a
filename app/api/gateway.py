"""The gateway: which services nginx routes to, and how each is."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from http import HTTPStatus

import httpx
from fastapi import APIRouter, Request

from app.models import GatewayService, GatewayStatus, ServiceHealth
from app.settings import Settings

router = APIRouter(prefix="/api/gateway", tags=["gateway"])

# What each does, by its name, which is its place below /api/ and its group in nginx/templates/default.conf.template.
SERVICES = {"service1": "Orders", "service2": "Fulfilment"}
TELLABLE = frozenset({"healthy", "degraded", "unhealthy"})


class Gateway:
    """Asks each service for its health at most once in HEALTH_CACHE seconds, however many clients ask."""

    def __init__(self, client: httpx.AsyncClient, addresses: Mapping[str, str], *, wait: float, cache: float) -> None:
        self._client, self._addresses = client, addresses
        self._wait, self._cache = wait, cache
        self._lock = asyncio.Lock()
        self._until = 0.0
        self._health: dict[str, ServiceHealth] = {}

    async def __call__(self) -> dict[str, ServiceHealth]:
        """The health of each service, by its name."""
        async with self._lock:
            if time.monotonic() >= self._until:
                found = await asyncio.gather(*(self._ask(address) for address in self._addresses.values()))
                self._health = dict(zip(self._addresses, found, strict=True))
                self._until = time.monotonic() + self._cache
            return self._health

    async def _ask(self, address: str) -> ServiceHealth:
        """What a service says of itself, else in which way it does not."""
        try:
            answer = await asyncio.wait_for(self._client.get(f"{address}/health"), self._wait)
            said = answer.json()["status"]
            told = said in TELLABLE and answer.status_code in (HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            return "unreachable"
        except (TimeoutError, httpx.TimeoutException):
            return "slow"
        except (httpx.HTTPError, ValueError, LookupError, TypeError):
            return "broken"
        return said if told else "broken"


@asynccontextmanager
async def watch(settings: Settings) -> AsyncIterator[Gateway]:
    """The gateway's view of the services at SERVICE1_URL and SERVICE2_URL, with a client of its own."""
    addresses = {name: getattr(settings, f"{name}_url").rstrip("/") for name in SERVICES}
    limits = httpx.Limits(max_connections=2 * len(addresses), max_keepalive_connections=len(addresses))
    wait = settings.health_timeout
    # No idle connection is used: one that the service has just closed would look like a service that is broken.
    async with httpx.AsyncClient(
        timeout=httpx.Timeout(wait, connect=wait / 2), limits=limits, trust_env=False, headers={"Connection": "close"}
    ) as client:
        yield Gateway(client, addresses, wait=wait, cache=settings.health_cache)


async def look(request: Request) -> dict[str, ServiceHealth]:
    """The health of each service, of a moment ago or of now."""
    gateway: Gateway = request.app.state.gateway
    return await gateway()


@router.get("/services")
async def services(request: Request) -> list[GatewayService]:
    """The services behind the gateway: where each is, and how."""
    health = await look(request)
    return [
        GatewayService(name=name, title=title, prefix=f"/api/{name}", health=health[name])
        for name, title in SERVICES.items()
    ]


@router.get("/status")
async def status(request: Request) -> GatewayStatus:
    """How the services are together: `unhealthy` when none of them serves."""
    health = await look(request)
    if set(health.values()) == {"healthy"}:
        overall = "healthy"
    elif {"healthy", "degraded"} & set(health.values()):
        overall = "degraded"
    else:
        overall = "unhealthy"
    return GatewayStatus.model_validate({"status": overall, "services": health, "timestamp": datetime.now(UTC)})
