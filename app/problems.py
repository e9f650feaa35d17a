"""Errors as classes with a status and a type, and the one renderer of `application/problem+json` (RFC 9457).

The first line of a class's docstring is the problem's title, and its detail unless one is given.
Nginx answers some statuses itself, in the same form: nginx/templates/problems.conf.template.
"""

import inspect
import random
from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Literal

import orjson

MEDIA_TYPE = "application/problem+json"


class Problem(Exception):  # noqa: N818  the term of RFC 9457
    """Something went wrong on our side."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    slug = "internal"
    # Seconds after which a repeat makes sense; None where it does not.
    retry_after: int | None = None
    headers: Mapping[str, str] = MappingProxyType({})

    def __init__(
        self, detail: str | None = None, *, retry_after: int | None = None, errors: list[dict[str, Any]] | None = None
    ) -> None:
        self.title = inspect.cleandoc(type(self).__doc__ or "").split("\n")[0].removesuffix(".")
        self.detail = detail or self.title
        self.retry_after = self.retry_after if retry_after is None else retry_after
        self.errors = errors
        super().__init__(self.detail)


class Malformed(Problem):
    """The request could not be read."""

    status = HTTPStatus.BAD_REQUEST
    slug = "bad-request"


class Unauthorized(Problem):
    """An API key is needed: `Authorization: Bearer <key>`."""

    status = HTTPStatus.UNAUTHORIZED
    slug = "unauthorized"

    def __init__(self, detail: str | None = None, *, error: Literal["invalid_token"] | None = None) -> None:
        super().__init__(detail)
        # RFC 6750, section 3: a request without credentials is told no error.
        self.headers = {"www-authenticate": f'Bearer error="{error}"' if error else "Bearer"}


class Forbidden(Problem):
    """An API key of admin scope is needed."""

    status = HTTPStatus.FORBIDDEN
    slug = "forbidden"
    headers = MappingProxyType({"www-authenticate": 'Bearer error="insufficient_scope", scope="admin"'})


class NotFound(Problem):
    """There is nothing here."""

    status = HTTPStatus.NOT_FOUND
    slug = "not-found"


class MethodNotAllowed(Problem):
    """The resource does not know that method."""

    status = HTTPStatus.METHOD_NOT_ALLOWED
    slug = "method-not-allowed"


class Conflict(Problem):
    """The resource is not in a state that allows this."""

    status = HTTPStatus.CONFLICT
    slug = "conflict"


class InFlight(Problem):
    """An earlier request with this key is still being served."""

    status = HTTPStatus.CONFLICT
    slug = "in-flight"
    retry_after = 1


class PreconditionFailed(Problem):
    """The resource has changed since the version named in If-Match."""

    status = HTTPStatus.PRECONDITION_FAILED
    slug = "precondition-failed"


class BodyTooLarge(Problem):
    """The body is larger than this API takes."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    slug = "body-too-large"


class UnsupportedMediaType(Problem):
    """The body is not of a media type that is understood here."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    slug = "unsupported-media-type"


class Invalid(Problem):
    """The request does not match the schema."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    slug = "invalid"


class KeyReused(Problem):
    """The Idempotency-Key was used before with another body."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    slug = "key-reused"


class QuotaExceeded(Problem):
    """The API key has used up its quota."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    slug = "quota-exceeded"
    retry_after = 1


class Unavailable(Problem):
    """A server that this needs does not answer."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    slug = "unavailable"
    retry_after = 2


class Overloaded(Unavailable):
    """The API works at as many requests as it takes; nothing was done."""

    slug = "overloaded"
    retry_after = 1


class QueueFull(Unavailable):
    """The queue holds as many tasks as it may; nothing was done."""

    slug = "queue-full"
    retry_after = 5


class WorkflowsFull(Unavailable):
    """As many workflows as may be have not ended yet; nothing was done."""

    slug = "workflows-full"
    retry_after = 5


class WatchersFull(Unavailable):
    """As many clients as may be are waiting for tasks."""

    slug = "watchers-full"
    retry_after = 5


class NotPublished(Unavailable):
    """The broker did not confirm the task; it will not run unless it is sent again."""

    slug = "not-published"


# What the framework raises by bare status, in our words.
BY_STATUS = {
    kind.status: kind
    for kind in (Malformed, NotFound, MethodNotAllowed, BodyTooLarge, UnsupportedMediaType, Unavailable)
}


def of_status(status: int) -> Problem:
    """The problem that stands for a bare HTTP status, such as the framework raises."""
    known = HTTPStatus(status)
    problem = BY_STATUS.get(known, Problem)()
    if problem.status is not known:
        problem.status, problem.slug = known, known.phrase.lower().replace(" ", "-")
        problem.title = problem.detail = known.phrase
    return problem


def jittered(seconds: int) -> int:
    """A whole number of seconds from `seconds` to half as much again: refused clients must not come back as one."""
    return random.randint(seconds, seconds + max(1, seconds // 2))  # noqa: S311  not for secrets


def document(problem: Problem, **members: Any) -> dict[str, Any]:
    """The members of `problem` (RFC 9457, section 3.1), and further ones."""
    told = {
        "type": f"urn:problem:{problem.slug}",
        "title": problem.title,
        "status": int(problem.status),
        "detail": problem.detail,
        **members,
    }
    return told if problem.errors is None else {**told, "errors": problem.errors}


def render(problem: Problem, *, instance: str, request_id: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer that tells of `problem` (RFC 9457, RFC 9110 Retry-After)."""
    headers = {"content-type": MEDIA_TYPE, "cache-control": "no-store", **problem.headers}
    if problem.retry_after is not None:
        headers["retry-after"] = str(jittered(problem.retry_after))
    return int(problem.status), headers, orjson.dumps(document(problem, instance=instance, request_id=request_id))


def example(problem: type[Problem]) -> dict[str, Any]:
    """The OpenAPI response that documents `problem`."""
    return {"description": problem().title, "content": {MEDIA_TYPE: {"schema": SCHEMA}}}


SCHEMA = {
    "type": "object",
    "title": "Problem",
    "required": ["type", "title", "status", "detail", "instance", "request_id"],
    "properties": {
        "type": {"type": "string", "examples": ["urn:problem:not-found"]},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "instance": {"type": "string"},
        "request_id": {"type": "string"},
        "errors": {"type": "array", "items": {"type": "object"}},
    },
}
