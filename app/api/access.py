"""Who may call, and how often, as plain ASGI: before routing and before the body is read.

So a path that is added later is guarded too, and a refusal costs next to nothing. `OPEN` lists what needs no key ever.
"""

from collections.abc import Mapping
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.security import HTTPBearer
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import problems
from app.api.errors import respond
from app.api.paths import own_path
from app.context import Context
from app.engine.identity import ANYONE, Principal
from app.engine.quotas import Allowance, Quota
from app.settings import Settings

OPEN = frozenset({"/", "/health", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"})
OPEN_BELOW = ("/health/", "/static-offline-docs/")

BEARER = HTTPBearer(scheme_name="apiKey", description="`python -m app api-keys create` makes one.", auto_error=False)


def is_open(path: str) -> bool:
    """Whether a path is served to everybody, whatever keys they have."""
    return path in OPEN or path.startswith(OPEN_BELOW)


class Access:
    """Checks the API key of each request, counts it against its quota, and leaves the principal in the scope's state.

    A request with a key that is not valid is refused even where none is needed: its client is mistaken about itself.
    Answers tell the quota in `RateLimit` and `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers-10).
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self._required = settings.api_keys_required
        self._quota = Quota(settings.quota_rate, settings.quota_burst)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI 3)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["state"]["principal"] = ANYONE
        fields: dict[str, str] = {}

        async def send_with_fields(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(fields)
            await send(message)

        try:
            if not is_open(own_path(scope)):
                scope["state"]["principal"] = await self._admit(scope, fields)
        except problems.Problem as problem:
            await respond(Request(scope), problem)(scope, receive, send_with_fields)
            return
        await self.app(scope, receive, send_with_fields if fields else send)

    async def _admit(self, scope: Scope, fields: dict[str, str]) -> Principal:
        """Who asks; `fields` gets what the answer is to tell. Raises `Unauthorized`, `QuotaExceeded`, `Unavailable`."""
        credentials = Headers(scope=scope).get("authorization")
        if credentials is None:
            if self._required:
                raise problems.Unauthorized
            return ANYONE
        scheme, _, key = credentials.partition(" ")
        if scheme.lower() != "bearer":
            raise problems.Unauthorized("Authorization: Bearer <key> is expected.", error="invalid_token")
        context: Context = scope["app"].state.context
        known = await context.keys.check(key.strip())
        structlog.contextvars.bind_contextvars(key=known.principal.id)
        quota = known.quota or self._quota
        allowance = await context.quotas.take(known.principal.id, quota)
        if allowance is not None:
            fields.update(rate_limit_fields(quota, allowance))
            if not allowance.passes:
                raise problems.QuotaExceeded(retry_after=allowance.wait)
        return known.principal


def rate_limit_fields(quota: Quota, allowance: Allowance) -> dict[str, str]:
    """The fields that tell a client of its quota: `q` requests in `w` seconds, `r` left, more in `t` seconds."""
    return {
        "ratelimit-policy": f'"default";q={quota.burst};w={quota.window}',
        "ratelimit": f'"default";r={allowance.left};t={allowance.wait}',
    }


def document(app: FastAPI, *, required: bool) -> None:
    """Let the OpenAPI document of `app` say which calls take a key, and what they answer without."""
    describe = app.openapi
    either: list[dict[str, list[str]]] = [] if required else [{}]

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = describe()
            schemes = schema.setdefault("components", {}).setdefault("securitySchemes", {})
            schemes[BEARER.scheme_name] = BEARER.model.model_dump(mode="json", by_alias=True, exclude_none=True)
            for path, item in schema["paths"].items():
                for operation in item.values() if not is_open(path) else ():
                    _document_operation(operation, [*either, {BEARER.scheme_name: []}])
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]  # how FastAPI has it done


def _document_operation(operation: dict[str, Any], security: list[dict[str, list[str]]]) -> None:
    refusals: Mapping[str, type[problems.Problem]] = {"401": problems.Unauthorized, "429": problems.QuotaExceeded}
    if "security" in operation:  # AdminDep
        refusals = {**refusals, "403": problems.Forbidden}
    operation.setdefault("security", security)
    for status, problem in refusals.items():
        operation["responses"].setdefault(status, problems.example(problem))
