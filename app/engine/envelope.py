"""The envelope in which events travel: CloudEvents 1.0, JSON format, with the schema's version as an extension."""

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from app.contracts import EVENTS, EventName, Payload
from app.database.documents import present

MEDIA_TYPE = "application/cloudevents+json"
BODY_MAX = 1_048_576  # bytes; nothing larger is taken in, nor read


class EnvelopeError(ValueError):
    """What came is no event that this code knows: no attempt would mend it."""


def _timed(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("has no time zone")
    return text


class _Attributes(BaseModel):
    """The context attributes of CloudEvents 1.0 (sections 3.1 and 3.2); extensions that we do not know pass."""

    model_config = ConfigDict(extra="ignore", strict=True)

    specversion: Literal["1.0"]
    id: Annotated[str, Field(min_length=1, max_length=255)]
    type: str
    source: Annotated[str, Field(min_length=1, max_length=255, pattern=r"^\S+$")]
    time: Annotated[str, AfterValidator(_timed)]
    datacontenttype: Literal["application/json"] = "application/json"
    dataversion: int
    data: Any


@dataclass(frozen=True, slots=True)
class Event:
    """Something that has happened. `source` and `id` together name it: two with the same are one event."""

    id: str
    type: EventName
    source: str
    time: str  # RFC 3339, UTC
    data: Payload

    @classmethod
    def new(cls, event_id: str, data: Payload, *, kind: EventName, source: str, time: datetime | None = None) -> Self:
        """An event of the present time, unless `time` says another."""
        return cls(event_id, kind, source, moment(time or present()), data)

    def document(self) -> dict[str, Any]:
        """The envelope (CloudEvents 1.0, JSON event format)."""
        return document(
            event_id=self.id,
            kind=self.type,
            source=self.source,
            time=self.time,
            version=EVENTS[self.type].version,
            data=self.data.model_dump(mode="json"),
        )

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """The event in a message. Raises `EnvelopeError` for what is broken, unknown, or of another version."""
        if len(body) > BODY_MAX:
            raise EnvelopeError(f"it is larger than {BODY_MAX} bytes")
        try:
            found = _Attributes.model_validate(orjson.loads(body))
        except orjson.JSONDecodeError:
            raise EnvelopeError("it is not JSON") from None
        except ValidationError as error:
            raise EnvelopeError(f"it is no event: {_told(error)}") from None
        if found.type not in EVENTS:
            raise EnvelopeError(f"the type {found.type!r:.100} is not known")
        kind = EventName(found.type)
        contract = EVENTS[kind]
        if found.dataversion != contract.version:
            raise EnvelopeError(f"version {found.dataversion} of {kind} is not known")
        try:
            # As JSON: a tuple of the schema is an array there.
            data = contract.data.model_validate_json(orjson.dumps(found.data))
        except ValidationError as error:
            raise EnvelopeError(f"its data is no {kind}: {_told(error)}") from None
        return cls(found.id, kind, found.source, found.time, data)


def document(*, event_id: str, kind: str, source: str, time: str, version: int, data: Any) -> dict[str, Any]:  # noqa: PLR0913
    """An envelope of attributes that are right already: who relays an event need not know its type."""
    return {
        "specversion": "1.0",
        "id": event_id,
        "type": str(kind),
        "source": source,
        "time": time,
        "datacontenttype": "application/json",
        "dataversion": version,
        "data": data,
    }


def marker_of(service: str, event: Event) -> str:
    """The name of an event that was handled by a service."""
    return f"{service} {event.source} {event.id}"


def moment(time: datetime) -> str:
    """A time as envelopes tell it: RFC 3339, UTC, in milliseconds."""
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _told(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'envelope'}: {first['msg']}"
