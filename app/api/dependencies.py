"""What handlers ask for by type: the context, and the identity of the request."""

from dataclasses import replace
from typing import Annotated

from fastapi import Depends, Header, Request

from app import problems
from app.context import Context
from app.engine.identity import Identity, identity_uuid
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


class RequestIdentity:
    """Who asks for what, once: by the client's Idempotency-Key where there is one, else by the edge's key."""

    def __init__(
        self,
        request: Request,
        idempotency_key: Annotated[
            str | None,
            Header(description=f"Repeats with the same key make one task or item ({KEY_MIN}-{KEY_MAX} characters)."),
        ] = None,
    ) -> None:
        key = None if idempotency_key is None else idempotency_key.strip().removeprefix('"').removesuffix('"')
        if key is not None and not (KEY_MIN <= len(key) <= KEY_MAX and key.isascii() and key.isprintable()):
            raise problems.Invalid(f"Idempotency-Key: {KEY_MIN} to {KEY_MAX} printable ASCII characters are expected.")
        self.from_client = key is not None
        route = f"{request.method} {request.scope['route'].path}"
        self._secret = request.app.state.context.settings.identity_secret.get_secret_value()
        self._identity = (
            Identity("client", ANONYMOUS, route, key)
            if key is not None
            else Identity("edge", ANONYMOUS, route, request.scope["state"]["edge_key"])
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
