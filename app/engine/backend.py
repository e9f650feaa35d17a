"""Celery's result backend, writing the task's record: record, result, archive and notice in one script."""

import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import structlog
from billiard.process import current_process
from celery import states
from celery.app.task import Context
from celery.backends.redis import RedisBackend
from celery.exceptions import NotRegistered, Reject, SoftTimeLimitExceeded
from redis.exceptions import RedisError

from app.engine.errors import error_of
from app.engine.publisher import RECORD
from app.engine.state import Message, Status, TaskStore, encode_result, error_document

T = TypeVar("T")

log = structlog.get_logger(__name__)

FINAL_STATUS = {
    states.SUCCESS: Status.SUCCESS,
    states.FAILURE: Status.FAILURE,
    states.REVOKED: Status.CANCELLED,
}
UNKNOWN_TASK = "No worker knows this task; its module is not there, or the workers are older than the API."


def has_record(request: Context | None) -> bool:
    """Whether a message came from our publisher; those of Celery's own canvas have no record."""
    # What Celery hands over for a task that it does not know has no headers at all.
    return RECORD in (getattr(request, "headers", None) or {})


def message_of(request: Context, task_name: str) -> Message:
    """The message by which a Celery request with a record came; once the task has started, with its run."""
    started: Message | None = getattr(request, "started", None)
    if started is not None:
        return started
    header: Mapping[str, Any] = request.headers[RECORD]
    return Message(
        task_id=request.id,
        name=task_name,
        queue=header["queue"],
        payload=request.kwargs["payload"],
        digest=header["digest"],
        request_id=header["request_id"],
        owner=header["owner"],
        epoch=header["epoch"],
        retries=request.retries or 0,
        publish=header["publish"],
        created_at=header["created_at"],
    )


def patiently(call: Callable[[], T], seconds: float) -> T:
    """Do `call`, waiting where we stand up to `seconds` while Redis cannot serve.

    Raises `Reject` (requeue) when that or the task's soft time limit is over: the message goes back, since it is not
    the task that failed. To requeue at once would burn the delivery limit.
    """
    deadline = time.monotonic() + seconds
    pause = 0.1
    try:
        while True:
            try:
                return call()
            except RedisError as error:
                if time.monotonic() > deadline:
                    raise
                log.warning("waiting for Redis", error=type(error).__name__)
            time.sleep(pause)
            pause = min(2 * pause, 5)
    except (RedisError, SoftTimeLimitExceeded) as error:
        log.warning("Redis cannot serve, the message goes back", error=f"{type(error).__name__}: {error}")
        raise Reject(error, requeue=True) from error


class RecordBackend(RedisBackend):  # type: ignore[misc]  # Celery has no types
    """Celery's Redis backend, but the final state of a task with a record is written by the script `finish`.

    The states before are the Task's business.
    """

    # Seconds to wait for Redis. Worker processes wait long; their parent, which writes the end of a killed child's
    # task, must not stand still.
    patience: ClassVar[float] = 1

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
            self._write(lambda: self.store.fail(task_id, error_document("unknown_task", UNKNOWN_TASK)))
            return self.encode_result(result, state)
        if request is None or not has_record(request):
            return super().store_result(task_id, result, state, traceback=traceback, request=request, **kwargs)
        encoded = self.encode_result(result, state)
        if state in FINAL_STATUS:
            meta = self._get_result_meta(result=encoded, state=state, traceback=traceback, request=request)
            meta["task_id"] = task_id
            value = encode_result(encoded if state == states.SUCCESS else error_of(result))
            message, status = message_of(request, request.task), FINAL_STATUS[state]
            self._write(lambda: self._finish(message, status, value, self.encode(meta)))
        return encoded

    def _write(self, call: Callable[[], None]) -> None:
        try:
            patiently(call, self.patience)
        except Reject:
            if current_process().name == "MainProcess":
                # There is no message to give back here; the record is left as it was.
                log.warning("the end of a task could not be written")
                return
            raise

    def _finish(self, message: Message, status: Status, value: bytes, celery_result: str) -> None:
        written = self.store.finish(message, status, value, celery_result)
        if written != status:
            log.info("another run of this task has ended it", task_id=message.task_id, status=status)
