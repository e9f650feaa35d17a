"""Celery's result backend, writing the task's record: record, result, archive and notice in one script."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import structlog
from celery import states
from celery.app.task import Context
from celery.backends.redis import RedisBackend
from celery.exceptions import NotRegistered, SoftTimeLimitExceeded, TaskRevokedError, TimeLimitExceeded

from app.engine.publisher import RECORD
from app.engine.state import Message, Status, TaskStore, encode_result, error_document

log = structlog.get_logger(__name__)

FINAL_STATUS = {
    states.SUCCESS: Status.SUCCESS,
    states.FAILURE: Status.FAILURE,
    states.REVOKED: Status.CANCELLED,
}
UNKNOWN_TASK = "No worker knows this task; its module is not there, or the workers are older than the API."


class TaskError(Exception):
    """An error whose `kind` and message go into the record as they are: raise it for failures that have a name."""

    kind = "failed"


class PermanentError(TaskError):
    """A failure that no further attempt would mend."""


class ResultNotJsonError(PermanentError):
    """The result is not something that JSON can say."""

    kind = "result_not_json"


class ResultTooLargeError(PermanentError):
    """The result is larger than RESULT_MAX_BYTES."""

    kind = "result_too_large"


def has_record(request: Context | None) -> bool:
    """Whether a message came from our publisher; those of Celery's own canvas have no record."""
    # What Celery hands over for a task that it does not know has no headers at all.
    return RECORD in (getattr(request, "headers", None) or {})


def message_of(request: Context, task_name: str) -> Message:
    """The message by which a Celery request with a record came."""
    header: Mapping[str, Any] = request.headers[RECORD]
    return Message(
        task_id=request.id,
        name=task_name,
        queue=header["queue"],
        payload=request.kwargs["payload"],
        digest=header["digest"],
        request_id=header["request_id"],
        epoch=header["epoch"],
        retries=request.retries or 0,
        publish=header["publish"],
        created_at=header["created_at"],
    )


def error_of(error: BaseException) -> dict[str, str]:
    """The error document of an exception; its traceback goes to the log alone."""
    if isinstance(error, TaskError):
        return error_document(error.kind, str(error))
    if isinstance(error, (SoftTimeLimitExceeded, TimeLimitExceeded)):
        return error_document("time_limit_exceeded", "The task ran longer than it may.")
    if isinstance(error, TaskRevokedError):
        return error_document("cancelled", str(error))
    return error_document(type(error).__name__, str(error))


class RecordBackend(RedisBackend):  # type: ignore[misc]  # Celery has no types
    """Celery's Redis backend, but the final state of a task with a record is written by the script `finish`.

    The states before are the Task's business. While Redis is away a final state is tried again, as
    `result_backend_always_retry` has it.
    """

    @cached_property
    def store(self) -> TaskStore:
        """The records, over this process's own connection pool."""
        client = self._create_client(**self.connparams, decode_responses=True)
        return TaskStore(client, celery_result_ttl=int(self.expires))

    def store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: str | None = None,
        request: Context | None = None,
        **kwargs: Any,
    ) -> Any:
        """Store a state as Celery asks; returns the result in the form it was stored in."""
        if isinstance(result, NotRegistered):
            # Celery hands over no request to speak of, but the record is there.
            self._ensure_retryable(self.store.fail, task_id, error_document("unknown_task", UNKNOWN_TASK))
            return self.encode_result(result, state)
        if request is None or not has_record(request):
            return super().store_result(task_id, result, state, traceback=traceback, request=request, **kwargs)
        encoded = self.encode_result(result, state)
        if state in FINAL_STATUS:
            meta = self._get_result_meta(result=encoded, state=state, traceback=traceback, request=request)
            meta["task_id"] = task_id
            value = encode_result(encoded if state == states.SUCCESS else error_of(result))
            self._ensure_retryable(
                self._finish, message_of(request, request.task), FINAL_STATUS[state], value, self.encode(meta)
            )
        return encoded

    def _finish(self, message: Message, status: Status, value: bytes, celery_result: str) -> None:
        written = self.store.finish(message, status, value, celery_result)
        if written != status:
            log.info("another run of this task has ended it", task_id=message.task_id, status=status)
