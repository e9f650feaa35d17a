"""Errors as problem+json, as the API's are, and the id of each request."""

import re
from http import HTTPStatus
from uuid import uuid4

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pymongo.errors import PyMongoError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import problems

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
ERRORS_MAX = 20  # of a validation that are told

log = structlog.get_logger(__name__)


class OutOfStock(problems.Conflict):
    """The shelf holds too few."""

    slug = "out-of-stock"


class PaymentRefused(problems.Problem):
    """The card is refused."""

    status = HTTPStatus.PAYMENT_REQUIRED
    slug = "payment-refused"


class UnknownAddress(problems.Invalid):
    """Nothing can be sent to this address."""

    slug = "unknown-address"


class Numbered:
    """Gives each request its id, the caller's `X-Request-ID` if it is well-formed, and a log line (plain ASGI)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI 3)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            write = log.debug if scope["path"] == "/health" else log.info
            write("request", method=scope["method"], path=scope["path"], status=status, request_id=request_id)


def rendered(scope: Scope, problem: problems.Problem) -> Response:
    """The response that tells of `problem`."""
    status, headers, body = problems.render(problem, instance=scope["path"], request_id=scope["state"]["request_id"])
    return Response(body, status, headers)


def install(app: FastAPI) -> None:
    """Register the handlers with `app`."""

    @app.exception_handler(problems.Problem)
    async def known(request: Request, error: problems.Problem) -> Response:
        return rendered(request.scope, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        told = [{name: row[name] for name in ("loc", "msg", "type")} for row in error.errors()[:ERRORS_MAX]]
        return rendered(request.scope, problems.Invalid(errors=told))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        return rendered(request.scope, problems.of_status(error.status_code))

    @app.exception_handler(PyMongoError)
    async def mongodb_away(request: Request, error: PyMongoError) -> Response:
        log.warning("MongoDB failed", error=f"{type(error).__name__}: {error}")
        return rendered(request.scope, problems.Unavailable("MongoDB does not answer; ask again with the same key."))

    @app.exception_handler(Exception)
    async def unknown(request: Request, _error: Exception) -> Response:
        return rendered(request.scope, problems.Problem())
