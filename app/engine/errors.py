"""Failures of tasks that have a name: what a body raises, and what the record then says."""

from celery.exceptions import SoftTimeLimitExceeded, TaskRevokedError, TimeLimitExceeded
from pydantic import ValidationError

from app.engine.record import error_document


class TaskError(Exception):
    """An error whose `kind` and message go into the record as they are; it is retried like any other."""

    kind = "failed"


class PermanentError(TaskError):
    """A failure that no further attempt would mend."""


class ResultNotJsonError(PermanentError):
    """The result is not something that JSON can say."""

    kind = "result_not_json"


class ResultTooLargeError(PermanentError):
    """The result is larger than RESULT_MAX_BYTES."""

    kind = "result_too_large"


# No further attempt would help: what a body says so of, a payload that does not fit, a time limit passed.
PERMANENT = (PermanentError, ValidationError, SoftTimeLimitExceeded)


def reason_of(error: BaseException) -> str:
    """Why a task that ended with `error` is not tried again, in a word for its dead letter."""
    if isinstance(error, (SoftTimeLimitExceeded, TimeLimitExceeded)):
        return "time_limit"
    return "permanent" if isinstance(error, PERMANENT) else "exhausted"


def error_of(error: BaseException) -> dict[str, str]:
    """The error document of an exception; its traceback goes to the log alone."""
    if isinstance(error, TaskError):
        return error_document(error.kind, str(error))
    if isinstance(error, (SoftTimeLimitExceeded, TimeLimitExceeded)):
        return error_document("time_limit_exceeded", "The task ran longer than it may.")
    if isinstance(error, TaskRevokedError):
        return error_document("cancelled", str(error))
    return error_document(type(error).__name__, str(error))
