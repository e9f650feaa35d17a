"""Events: tell all services that subscribe to them what has happened."""

from typing import Any

from fastapi import APIRouter, Response

from app import problems
from app.api.dependencies import ContextDep, IdentityDep
from app.api.parsing import validated
from app.contracts import EVENTS, EventName, Payload
from app.engine.identity import body_digest
from app.models import EventAccepted, EventRequest

router = APIRouter(prefix="/api/events", tags=["events"])


@router.post("", status_code=202, responses={503: problems.example(problems.EventNotPublished)})
async def publish(body: EventRequest, context: ContextDep, identity: IdentityDep, response: Response) -> EventAccepted:
    """Publish an event. It has left for every service that subscribes to its type once this is answered."""
    data = _data(body.event_type, body.data)
    digest = body_digest([body.event_type, data.model_dump(mode="json")])
    event, replayed = await context.events.publish(
        body.event_type, data, event_id=identity.id, digest=digest, keyed=identity.from_client
    )
    response.headers.update(identity.replay_headers(replayed=replayed))
    return EventAccepted(event_id=event.id, event_type=event.type, time=event.time)


def _data(kind: EventName, data: dict[str, Any]) -> Payload:
    contract = EVENTS[kind]
    if contract.internal:
        raise problems.Invalid(f"The stack itself tells of {kind}; nobody else may.")
    return validated(contract.data, data, "data")
