"""What handlers ask for by type: the context, and the identity of the request."""

from dataclasses import replace
from typing import Annotated

from fastapi import Depends, Header, Request, Security

from app import problems
from app.api.access import BEARER
from app.context import Context
from app.engine.identity import Identity, Principal, identity_uuid
from app.engine.live import Live

KEY_MIN, KEY_MAX = 16, 255
ANONYMOUS = "anonymous"


async def get_context(request: Request) -> Context:
    """The context that the application's lifespan opened."""
    context: Context = request.app.state.context
    return context


async def get_live(request: Request) -> Live:
    """The live updates of this process."""
    live: Live = request.app.state.live
    return live


async def get_request_id(request: Request) -> str:
    """The request's id, as `X-Request-ID` answers it."""
    request_id: str = request.scope["state"]["request_id"]
    return request_id


async def get_edge_key(request: Request) -> str:
    """The edge's name for the client request that this is: the same when nginx tries the next replica."""
    edge_key: str = request.scope["state"]["edge_key"]
    return edge_key


async def get_principal(request: Request) -> Principal:
    """Who asks, as the request's API key says; `ANYONE` without one."""
    principal: Principal = request.scope["state"]["principal"]
    return principal


PrincipalDep = Annotated[Principal, Depends(get_principal)]


def require_admin(principal: Principal) -> None:
    """Raise `Unauthorized` for who has no key, `Forbidden` for who has one without admin scope."""
    if not principal.id:
        raise problems.Unauthorized
    if not principal.admin:
        raise problems.Forbidden


async def get_admin(principal: PrincipalDep, _documented: Annotated[object, Security(BEARER)]) -> Principal:
    """Who asks, with a key of admin scope. Raises as `require_admin` does."""
    require_admin(principal)
    return principal


AdminDep = Annotated[Principal, Depends(get_admin)]


class RequestIdentity:
    """Who asks for what, once: by the client's Idempotency-Key where there is one, else by the edge's key.

    Two API keys never meet in one identity. Those who have none share theirs, so they need keys that nobody guesses.
    """

    def __init__(
        self,
        request: Request,
        principal: PrincipalDep,
        idempotency_key: Annotated[
            str | None,
            Header(
                description=f"Repeats with the same key make one task or item (up to {KEY_MAX} characters; "
                f"without an API key at least {KEY_MIN})."
            ),
        ] = None,
    ) -> None:
        least = 1 if principal.id else KEY_MIN
        key = None if idempotency_key is None else idempotency_key.strip().removeprefix('"').removesuffix('"')
        if key is not None and not (least <= len(key) <= KEY_MAX and key.isascii() and key.isprintable()):
            raise problems.Invalid(f"Idempotency-Key: {least} to {KEY_MAX} printable ASCII characters are expected.")
        if len(request.headers.getlist("idempotency-key")) > 1:
            raise problems.Invalid("Idempotency-Key: more than one was sent.")
        self.from_client = key is not None
        route = f"{request.method} {request.scope['route'].path}"
        who = principal.id or ANONYMOUS
        self._secret = request.app.state.context.settings.identity_secret.get_secret_value()
        self._identity = (
            Identity("client", who, route, key)
            if key is not None
            else Identity("edge", who, route, request.scope["state"]["edge_key"])
        )
        self.id = identity_uuid(self._secret, self._identity)

    def row_id(self, row: int) -> str:
        """The id of one row of this request, counted from 0: the same when the request comes again."""
        return identity_uuid(self._secret, replace(self._identity, row=row))

    def replay_headers(self, *, replayed: bool) -> dict[str, str]:
        """`Idempotent-Replayed` for a repeat that the client made; a replay by nginx is nobody's business."""
        return {"Idempotent-Replayed": "true"} if replayed and self.from_client else {}


ContextDep = Annotated[Context, Depends(get_context)]
LiveDep = Annotated[Live, Depends(get_live)]
RequestIdDep = Annotated[str, Depends(get_request_id)]
EdgeKeyDep = Annotated[str, Depends(get_edge_key)]
IdentityDep = Annotated[RequestIdentity, Depends()]
