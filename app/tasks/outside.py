"""Calls to the outside world: how tasks make them so that a repeat does no harm, and what an answer means to a task."""

import re
import time
from collections.abc import Mapping
from functools import cache
from http import HTTPStatus
from typing import Any, ClassVar

import httpx
import orjson
from celery.exceptions import SoftTimeLimitExceeded

from app.context import worker_context
from app.contracts import Backend
from app.engine.breakers import Breakers
from app.engine.errors import PermanentError, TaskError
from app.engine.message import has_record, message_of
from app.engine.task import LightTask

ANSWER_MAX = 65_536  # bytes
DETAIL_MAX = 500  # characters of a refusal that a record keeps
KIND = re.compile(r"urn:problem:([a-z-]{1,40})")
# What a repeat may answer otherwise.
PASSING = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}


class OutsideError(TaskError):
    """A backend could not be reached, answered too late or was broken: whether it did anything is not known."""

    kind = "outside_unavailable"


class RefusedError(PermanentError):
    """A backend will not do what was asked, however often it is; `kind` is its problem's type (RFC 9457)."""

    def __init__(self, kind: str, detail: str) -> None:
        # Celery makes a copy of it out of its arguments.
        super().__init__(kind, detail)
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[1])


class Call(LightTask):
    """A step that calls the outside world: tried for about ten minutes, then it fails and what was done is undone."""

    abstract = True
    max_retries: int | None = 20
    backoff_cap: ClassVar[int] = 60

    def key(self, step: str) -> str:
        """The Idempotency-Key of a step: the same for each attempt, and for the task that undoes it."""
        return f"{self.workflow or self.request.id or 'direct'}:{step}"

    def post(self, backend: Backend, path: str, *, step: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What a backend answers to a POST of `body`, {} where it has nothing to say; `step` names what is done.

        Raises `RefusedError` where it refuses, `OutsideError` and `BreakerOpenError` where another attempt may help.
        """
        try:
            return self._post(backend, path, self.key(step), body)
        except SoftTimeLimitExceeded as error:
            # Elsewhere a task that ran too long would do so again; this one waited for others.
            raise OutsideError(f"{backend} had not answered when the task's time was over.") from error

    def _post(self, backend: Backend, path: str, key: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        headers = {"idempotency-key": key}
        if has_record(self.request):
            headers["x-request-id"] = message_of(self.request, self.name).request_id
        leave = _breakers().enter(backend)
        answer = None
        try:
            answer = _ask(
                worker_context().http, f"{worker_context().settings.outside_url}/{backend}{path}", body, headers
            )
        finally:
            # Also what interrupts a call, such as a time limit, speaks against who did not answer.
            _breakers().report(leave, well=answer is not None and answer.status_code < HTTPStatus.INTERNAL_SERVER_ERROR)
        return meaning(backend, answer)


class UndoCall(Call):
    """What undoes a step: tried until it is done."""

    abstract = True
    max_retries = None
    backoff_cap: ClassVar[int] = 600

    def undo(self, backend: Backend, path: str, *, step: str) -> dict[str, Any]:
        """Take back what `step` names, also where it was never done. Raises as `post` does."""
        self.post(backend, path, step=step)
        return {}


def meaning(backend: str, answer: httpx.Response) -> dict[str, Any]:
    """What an answer says. Raises `RefusedError` for what will stay as it is, `OutsideError` for what may change."""
    if answer.is_success:
        return _object(backend, answer) if answer.content else {}
    if answer.is_client_error and answer.status_code not in PASSING:
        raise _refusal(backend, answer)
    raise OutsideError(f"{backend} answered {answer.status_code}.")


def _ask(client: httpx.Client, url: str, body: Mapping[str, Any] | None, headers: dict[str, str]) -> httpx.Response:
    # The client's own time-out is that of each part.
    deadline = time.monotonic() + 2 * (client.timeout.read or 0)
    try:
        with client.stream("POST", url, json=body, headers=headers) as answer:
            content = bytearray()
            for part in answer.iter_bytes():
                content += part
                if len(content) > ANSWER_MAX or time.monotonic() > deadline:
                    raise OutsideError(f"{url} answered too much, or too slowly.")
    except httpx.TransportError as error:
        raise OutsideError(f"{url}: {type(error).__name__} {error}") from error
    return httpx.Response(answer.status_code, content=bytes(content))


def _object(backend: str, answer: httpx.Response) -> dict[str, Any]:
    try:
        content = orjson.loads(answer.content)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise OutsideError(f"{backend} answered what is no JSON object.")
    return content


def _refusal(backend: str, answer: httpx.Response) -> RefusedError:
    try:
        problem = _object(backend, answer)
    except OutsideError:
        problem = {}
    form = KIND.fullmatch(str(problem.get("type", "")))
    kind = form[1].replace("-", "_") if form else "refused"
    detail = str(problem.get("detail") or f"{backend} answered {answer.status_code}.")
    return RefusedError(kind, detail[:DETAIL_MAX])


@cache
def _breakers() -> Breakers:
    # One a process, over clients that were opened after the fork.
    context = worker_context()
    settings = context.settings
    return Breakers(
        context.redis,
        failures=settings.breaker_failures,
        window=settings.breaker_window,
        seconds=settings.breaker_open_seconds,
        lease=4 * settings.outside_timeout + 1,
    )
