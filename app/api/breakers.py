"""The circuit breakers of the backends that tasks call. For operators."""

from fastapi import APIRouter

from app.api.dependencies import AdminDep, ContextDep
from app.contracts import Backend
from app.engine.breakers import breakers
from app.models import CircuitBreakers

router = APIRouter(prefix="/api/circuit-breakers", tags=["circuit breakers"])


@router.get("")
async def list_breakers(context: ContextDep, _admin: AdminDep) -> CircuitBreakers:
    """Every backend's breaker, as all workers share it."""
    return CircuitBreakers.model_validate({"breakers": await breakers(context.redis, Backend)}, from_attributes=True)
