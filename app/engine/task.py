"""The base of all tasks: it owns state, retries, progress, cancellation and the log line; a task's body only works.

A failure for good is raised through Celery: its tracer has RecordBackend write FAILURE, and `task_acks_on_failure`
then rejects the message, which RabbitMQ dead-letters.
"""

import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, ClassVar

import celery
import structlog
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from pymongo.errors import PyMongoError
from redis.exceptions import RedisError

from app.engine.backend import patiently
from app.engine.errors import PERMANENT, PermanentError, ResultNotJsonError, ResultTooLargeError, error_of
from app.engine.message import RECORD, Message, has_record, message_of, new_publish, record_header
from app.engine.queues import BROKER_ERRORS
from app.engine.record import encode_result
from app.engine.state import Started

log = structlog.get_logger(__name__)

CONFIRM_TIMEOUT = 10  # seconds that the broker may take to confirm a retry
TURN_WAIT = 2.0  # seconds that a run waits in its worker for its turn; with more to wait its message is put off
TURN_SLICE = 0.25  # seconds of that between two looks whether it is to stop


class Cancelled(BaseException):
    """Raised by `progress` when the task is to stop: not an `Exception`, so that no body catches it by accident."""


class Superseded(BaseException):
    """Raised by `progress` when another run of the same task has taken over."""


def _whole(number: float) -> int:
    # What a record, and MongoDB, can hold.
    return max(0, min(int(number), 2**53))


def backoff(retries: int, cap: int) -> int:
    """Seconds before attempt `retries` + 1: exponential with full jitter, at least 1, at most `cap`.

    Whole seconds, because Celery's delayed delivery knows no parts of one.
    """
    return random.randint(1, max(1, min(cap, 2 ** min(retries + 1, 30))))  # noqa: S311  spreads load, hides nothing


def fenced(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that is called only by the process that wrote the state it tells of, and whose errors end nothing."""

    @wraps(hook)
    def call(self: "Task", outcome: Any, task_id: str, *args: Any) -> None:
        if self.backend.settled != task_id:
            return
        try:
            hook(self, outcome, task_id, *args)
        except Exception:
            log.exception("a hook failed", hook=hook.__name__, task_id=task_id)

    return call


class Task(celery.Task):  # type: ignore[misc]  # Celery has no types
    """Base of all tasks; `HeavyTask` and `LightTask` say how often a failure is tried again.

    A body raises `PermanentError` (or a subclass with a `kind`) where no further attempt would help; a payload that
    does not fit its schema and a passed time limit count as such. Any other exception is retried.

    Hooks to override, with Celery's signatures: `on_success(result, task_id, args, kwargs)`, `on_retry` and
    `on_failure(error, task_id, args, kwargs, einfo)`. Each is called once the state is written, at most once a state:
    not by a run that was superseded, and not if the worker dies in between. What must not be missed listens to the
    event `task.failed`.
    """

    abstract = True
    throws = (PermanentError,)
    backoff_cap: ClassVar[int] = 600
    overall_rate: ClassVar[float | None] = None  # starts a second over all workers; None sets no limit
    # Taken from the configuration when the task is bound to its app.
    progress_interval: float = None  # type: ignore[assignment]  # None tells Celery to look there
    result_max_bytes: int = None  # type: ignore[assignment]
    from_config = (
        *celery.Task.from_config,
        ("progress_interval", "progress_interval"),
        ("result_max_bytes", "result_max_bytes"),
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Fence the hooks that a subclass, or a task of it, defines."""
        super().__init_subclass__(**kwargs)
        for name in ("on_success", "on_retry", "on_failure"):
            if name in vars(cls):
                setattr(cls, name, fenced(vars(cls)[name]))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body for a message from the queue, or plainly when called as a function."""
        if self.request.called_directly or not has_record(self.request):
            return self.run(*args, **kwargs)
        message = message_of(self.request, self.name)
        structlog.contextvars.bind_contextvars(task_id=message.task_id, request_id=message.request_id, task=self.name)
        try:
            return self._enter(message, args, kwargs)
        finally:
            structlog.contextvars.clear_contextvars()

    def progress(self, current: float, total: float) -> None:
        """Tell how far the work has come, as often as you like: at most ten calls a second reach Redis.

        This is also where a task learns that it is to stop, so call it at least every few seconds. Raises `Cancelled`
        or `Superseded`, which are to pass through the body (clean up in `finally`).
        """
        request = self.request
        now = time.monotonic()
        if now < getattr(request, "next_progress", 0.0) and current != total:
            return
        if request.called_directly or not has_record(request):
            return
        request.next_progress = now + self.progress_interval
        try:
            answer = self.backend.store.progress(message_of(request, self.name), _whole(current), _whole(total))
        except (RedisError, PyMongoError):
            # Progress is worth less than the work; the next call tries again.
            log.warning("progress not written, a server cannot serve")
            return
        if answer == "cancel":
            raise Cancelled
        if answer == "lost":
            raise Superseded

    @property
    def workflow(self) -> str:
        """The id of the workflow that this run is for, as a member of it or as what takes one back; "" where none."""
        return message_of(self.request, self.name).workflow if has_record(self.request) else ""

    def _enter(self, message: Message, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.backend.settled = None
        call = new_publish()
        started = patiently(
            lambda: self.backend.store.start(message, self.request.hostname, call), self.backend.patience
        )
        match started.outcome:
            case "run":
                message = self.request.started = replace(message, run=started.run)
                if self.overall_rate is not None and not self._has_turn(message, self.overall_rate):
                    raise Ignore
                return self._run(message, args, kwargs)
            case "stored":
                self.request.ended = True
                return started.result
            case "dead":
                self.request.ended = True
                self._end_dead(started)
            case "republish":
                self._republish(message, started)
            case "stale" | "duplicate":
                pass
            case outcome:
                raise AssertionError(outcome)
        log.info("message ignored", outcome=started.outcome)
        raise Ignore

    def _has_turn(self, message: Message, rate: float) -> bool:
        """Wait until the task may start; False where it was put off, which is no failed attempt, or cancelled."""
        store = self.backend.store
        taken, wait = patiently(lambda: store.reserve(self.name, rate, TURN_WAIT), self.backend.patience)
        if not taken:
            countdown = math.ceil(wait * random.uniform(1, 2))  # noqa: S311  spreads load, hides nothing
            written = patiently(lambda: store.retry(message, countdown, None), self.backend.patience)
            if written == "RETRY":
                self._publish_again(message, message.retries, countdown)
            return False
        until = time.monotonic() + wait
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, TURN_SLICE))
            if patiently(lambda: store.cancelling(message), self.backend.patience):
                self._revoke(message)
                return False
        return True

    def _run(self, message: Message, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        began = time.monotonic()
        outcome = "ended from outside"
        try:
            result = self._checked(self.run(*args, **kwargs))
        except Cancelled:
            outcome = "CANCELLED"
            self._revoke(message)
            raise Ignore from None
        except Superseded:
            outcome = "superseded"
            raise Ignore from None
        except PERMANENT:
            outcome = "FAILURE"
            raise
        except Exception as error:
            outcome = "handed back"
            outcome = self._next(message, error)
            if outcome == "FAILURE":
                raise
            if outcome == "RETRY":
                raise Retry(exc=error) from None
            if outcome == "CANCELLED":
                self.request.ended = True
                self._revoke(message)
            raise Ignore from None
        else:
            outcome = "SUCCESS"
            return result
        finally:
            log.info(
                "task ran", outcome=outcome, attempt=message.retries + 1, seconds=round(time.monotonic() - began, 3)
            )

    def _revoke(self, message: Message) -> None:
        self.backend.mark_as_revoked(message.task_id, "Cancelled while it ran.", request=self.request)

    def _checked(self, result: Any) -> Any:
        try:
            size = len(encode_result(result))
        except (TypeError, ValueError) as error:
            raise ResultNotJsonError(f"The result cannot be told in JSON: {error}") from error
        if size > self.result_max_bytes:
            raise ResultTooLargeError(f"The result has {size} bytes, {self.result_max_bytes} are allowed.")
        return result

    def _next(self, message: Message, error: Exception) -> str:
        """What follows a failed attempt: FAILURE, RETRY (published), or that another run or a cancel was first."""
        if self.max_retries is not None and message.retries >= self.max_retries:
            return "FAILURE"
        countdown = backoff(message.retries, self.backoff_cap)
        written: str = patiently(
            lambda: self.backend.store.retry(message, countdown, error_of(error)), self.backend.patience
        )
        if written == "RETRY":
            self.backend.settled = message.task_id
            log.warning("attempt failed, will be retried", error=repr(error), retry_in=countdown)
            self._publish_again(message, message.retries + 1, countdown)
        return written

    def _republish(self, message: Message, started: Started) -> None:
        self._publish_again(message, started.retries, max(1, round(started.due_in)))

    def _publish_again(self, message: Message, retries: int, countdown: int) -> None:
        # A publish id of its own: should this message leave twice, the second one finds a stranger running.
        following = replace(message, retries=retries, publish=new_publish(), run=0)
        signature = self.signature_from_request(
            self.request,
            queue=message.queue,
            retries=retries,
            countdown=countdown,
            # The broker has held it back by then. By the hour, a worker whose clock is behind would hold it once more.
            headers={RECORD: record_header(following), "eta": None},
            confirm_timeout=CONFIRM_TIMEOUT,
        )
        try:
            signature.apply_async()
        except (*BROKER_ERRORS, SoftTimeLimitExceeded) as error:
            # Whatever the broker said, the record says RETRY: the redelivered message finds it and publishes again.
            log.warning("retry not published, the message goes back", error=f"{type(error).__name__}: {error}")
            raise Reject(error, requeue=True) from error

    def _end_dead(self, started: Started) -> None:
        """Tell the chord, chain and error callbacks of a task that was ended before this message came."""
        error = started.error or {}
        self.backend.mark_as_failure(
            self.request.id, PermanentError(error.get("message", "")), request=self.request, store_result=False
        )


class HeavyTask(Task):
    """Work that costs CPU or takes long: tried again three times."""

    abstract = True
    max_retries = 3


class LightTask(Task):
    """Short work, mostly I/O: tried again until it is done, at ever longer intervals up to ten minutes."""

    abstract = True
    max_retries: int | None = None
