"""What the routers share: the clients, the key of a request, and the world's health."""

import asyncio
from typing import Annotated, Any, Literal
from uuid import NAMESPACE_OID, uuid5

from fastapi import APIRouter, Depends, Header, Path, Request
from pydantic import BaseModel, ConfigDict, Field
from pymongo.errors import PyMongoError

from app.database import EffectRepository, StockRepository
from app.settings import Settings

router = APIRouter(tags=["health"])

KEY = r"^[!-~]{1,255}$"  # visible ASCII


class World:
    """What this application keeps, over one database."""

    def __init__(self, database: Any, settings: Settings) -> None:
        self.stock = StockRepository(database)
        self.effects = EffectRepository(database)
        self._database = database
        self._timeout = settings.health_timeout

    async def answers(self) -> bool:
        """Whether MongoDB answers within HEALTH_TIMEOUT."""
        try:
            await asyncio.wait_for(self._database.command("ping"), self._timeout)
        except (TimeoutError, PyMongoError):
            return False
        return True


async def get_world(request: Request) -> World:
    """The world that the application's lifespan opened."""
    world: World = request.app.state.world
    return world


WorldDep = Annotated[World, Depends(get_world)]
# IETF draft-ietf-httpapi-idempotency-key-header: two requests with one key are one.
KeyDep = Annotated[str, Header(alias="Idempotency-Key", pattern=KEY)]
KeyPath = Annotated[str, Path(pattern=KEY)]
Sku = Annotated[str, Path(pattern=r"^[a-z0-9-]{1,40}$")]
Cents = Annotated[int, Field(ge=0, le=10**12, description="An amount in cents.")]
Country = Annotated[str, Field(pattern=r"^[A-Z]{2}$", description="ISO 3166-1 alpha-2.")]


class Body(BaseModel):
    """Base of what is asked: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Effect(BaseModel):
    """What was done under a key, and whether it was taken back; `details` are null for what was never done."""

    key: str
    state: Literal["done", "undone"]
    details: dict[str, Any] | None


def reference(letter: str, key: str) -> str:
    """The number under which something that was done under `key` is known: the same each time."""
    return f"{letter}-{uuid5(NAMESPACE_OID, key).hex[:12]}"


@router.get("/health")
async def health(world: WorldDep) -> dict[str, Any]:
    """Whether this process turns; without MongoDB only tax, address and fraud are served."""
    connected = await world.answers()
    return {
        "status": "healthy" if connected else "degraded",
        "services": {"mongodb": "connected" if connected else "disconnected"},
    }
