"""Every error leaves as problem+json: the handlers that turn exceptions into `app.problems`."""

from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pymongo.errors import PyMongoError
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from app import problems

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
        if any(row["type"] == "json_invalid" for row in error.errors()):
            return respond(request, problems.Malformed("The body is not valid JSON."))
        return respond(request, problems.Invalid(errors=[_row(row) for row in error.errors()]))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        kind = problems.BY_STATUS.get(HTTPStatus(error.status_code), problems.Problem)
        response = respond(request, kind())
        response.headers.update(error.headers or {})  # Allow with a 405
        return response

    @app.exception_handler(PyMongoError)
    async def mongodb_away(request: Request, error: PyMongoError) -> Response:
        log.warning("MongoDB failed", error=f"{type(error).__name__}: {error}")
        return respond(request, problems.Unavailable("MongoDB does not answer; try again."))

    @app.exception_handler(RedisError)
    async def redis_away(request: Request, error: RedisError) -> Response:
        log.warning("Redis failed", error=f"{type(error).__name__}: {error}")
        return respond(request, problems.Unavailable("Redis does not answer; try again."))

    @app.exception_handler(Exception)
    async def unknown(request: Request, _error: Exception) -> Response:
        # The server logs the exception with its traceback; the client learns nothing of it.
        return respond(request, problems.Problem())


def _row(error: dict[str, Any]) -> dict[str, Any]:
    # Neither the refused value nor the exception: they may be large, secret or no JSON.
    return {"loc": list(error["loc"]), "msg": error["msg"], "type": error["type"]}
