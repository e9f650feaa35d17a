"""Every error leaves as problem+json: the handlers that turn exceptions into `app.problems`."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pymongo.errors import PyMongoError
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from app import problems

AWAY = "does not answer. A change may have been made all the same: look, or repeat it with the same Idempotency-Key."
METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")
ERRORS_MAX = 20  # of a validation that are told

log = structlog.get_logger(__name__)


def respond(request: Request, problem: problems.Problem) -> Response:
    """The response that tells of `problem`."""
    request_id = request.scope["state"]["request_id"]
    status, headers, body = problems.render(problem, instance=request.url.path, request_id=request_id)
    return Response(body, status, {**headers, "x-request-id": request_id})


def install(app: FastAPI) -> None:
    """Register the handlers with `app`."""

    @app.exception_handler(problems.Problem)
    async def known(request: Request, error: problems.Problem) -> Response:
        return respond(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return respond(request, _validation_problem(request, error))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        response = respond(request, problems.of_status(error.status_code))
        response.headers.update(error.headers or {})
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            response.headers["allow"] = ", ".join(sorted(_allowed(request)))
        return response

    @app.exception_handler(PyMongoError)
    async def mongodb_away(request: Request, error: PyMongoError) -> Response:
        log.warning("MongoDB failed", error=f"{type(error).__name__}: {error}")
        return respond(request, problems.Unavailable(f"MongoDB {AWAY}"))

    @app.exception_handler(RedisError)
    async def redis_away(request: Request, error: RedisError) -> Response:
        log.warning("Redis failed", error=f"{type(error).__name__}: {error}")
        return respond(request, problems.Unavailable(f"Redis {AWAY}"))

    @app.exception_handler(Exception)
    async def unknown(request: Request, _error: Exception) -> Response:
        # The server logs the exception with its traceback; the client learns nothing of it.
        return respond(request, problems.Problem())


def _validation_problem(request: Request, error: RequestValidationError) -> problems.Problem:
    rows = error.errors()
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if (
        media_type != "application/json"
        and not media_type.endswith("+json")
        and any(row["loc"][0] == "body" for row in rows)
    ):
        return problems.UnsupportedMediaType("Content-Type: application/json is expected.")
    if any(row["type"] == "json_invalid" for row in rows):
        return problems.Malformed("The body is not valid JSON.")
    return problems.Invalid(errors=told(rows))


def _allowed(request: Request) -> set[str]:
    # Starlette names the methods of the first route of the path alone.
    scopes = {method: {**request.scope, "method": method} for method in METHODS}
    return {
        method
        for method, scope in scopes.items()
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)
    }


def told(errors: Sequence[Any]) -> list[dict[str, Any]]:
    """What clients hear of a validation's errors, of the first ones if they are many."""
    # Neither the refused value nor the exception: they may be large, secret or no JSON.
    return [{"loc": list(error["loc"]), "msg": error["msg"], "type": error["type"]} for error in errors[:ERRORS_MAX]]
