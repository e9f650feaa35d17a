"""One identity a request: the same request seen twice gets the same task id."""

import hashlib
import hmac
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

import orjson


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: `id` names an API key, "" nobody in particular."""

    id: str = ""
    admin: bool = False

    def may_see(self, owner: str) -> bool:
        """Whether what belongs to `owner` is to be known to this one; what belongs to nobody is to all."""
        return not owner or self.admin or self.id == owner


ANYONE = Principal()


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks for what, once. `origin` tells whose key it is: the client's own, the edge's, or a workflow's."""

    origin: Literal["client", "edge", "workflow"]
    principal: str
    route: str  # method and path template
    key: str
    row: int | None = None  # of a batch


def identity_uuid(secret: str, identity: Identity) -> str:
    """The UUID (version 8, RFC 9562) that stands for `identity`; without `secret` nobody can guess or forge it."""
    parts: list[str | int] = [identity.origin, identity.principal, identity.route, identity.key]
    if identity.row is not None:
        parts.append(identity.row)
    digest = bytearray(hmac.digest(secret.encode(), orjson.dumps(parts), hashlib.sha256)[:16])
    digest[6] = digest[6] & 0x0F | 0x80
    digest[8] = digest[8] & 0x3F | 0x80
    return str(UUID(bytes=bytes(digest)))


def body_digest(body: Any) -> str:
    """SHA-256 over the canonical JSON of a validated body: equal for equal requests, however they were spelt."""
    return hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).hexdigest()
