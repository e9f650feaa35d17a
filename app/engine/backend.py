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
from pymongo.errors import PyMongoError
from redis.exceptions import RedisError

from app.database import ResultReader
from app.engine.errors import error_of, reason_of
from app.engine.message import Message, has_record, message_of
from app.engine.record import Status, encode_result, error_document
from app.engine.state import TaskStore

T = TypeVar("T")

log = structlog.get_logger(__name__)

FINAL_STATUS = {
    states.SUCCESS: Status.SUCCESS,
    states.FAILURE: Status.FAILURE,
    states.REVOKED: Status.CANCELLED,
}
UNKNOWN_TASK = "No worker knows this task; its module is not there, or the workers are older than the API."


def patiently(call: Callable[[], T], seconds: float) -> T:
    """Do `call`, waiting where we stand up to `seconds` while Redis, or the archive, cannot serve.

    Raises `Reject` (requeue) when that or the task's soft time limit is over: the message goes back, since it is not
    the task that failed. To requeue at once would burn the delivery limit.
    """
    deadline = time.monotonic() + seconds
    pause = 0.1
    try:
        while True:
            try:
                return call()
            except (RedisError, PyMongoError) as error:
                if time.monotonic() > deadline:
                    raise
                log.warning("waiting for a server", error=type(error).__name__)
            time.sleep(pause)
            pause = min(2 * pause, 5)
    except (RedisError, PyMongoError, SoftTimeLimitExceeded) as error:
        log.warning("a server cannot serve, the message goes back", error=f"{type(error).__name__}: {error}")
        raise Reject(error, requeue=True) from error


class RecordBackend(RedisBackend):  # type: ignore[misc]  # Celery has no types
    """Celery's Redis backend, but the final state of a task with a record is written by the script `finish`.

    The states before are the Task's business.
    """

    # Seconds to wait for Redis. Worker processes wait long; their parent, which writes the end of a killed child's
    # task, must not stand still.
    patience: ClassVar[float] = 1
    # The task whose state this process wrote last: what has not been written has not happened, and calls no hook.
    settled: str | None = None

    @cached_property
    def store(self) -> TaskStore:
        """The records, over this process's own connection pool."""
        client = self._create_client(**self.connparams, decode_responses=True)
        conf = self.app.conf
        return TaskStore(
            client,
            ResultReader(conf.archive_url, conf.archive_database, timeout=conf.archive_timeout),
            celery_result_ttl=int(self.expires),
            look_after=conf.look_after,
            run_limits=conf.run_limits,
        )

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
            fields: dict[str, str | bytes] = (
                {"result": encode_result(encoded)}
                if state == states.SUCCESS
                else {"error": encode_result(error_of(result)), "reason": reason_of(result)}
            )
            message, status = message_of(request, request.task), FINAL_STATUS[state]
            if not getattr(request, "ended", False):
                self._write(lambda: self._finish(request, message, status, fields, self.encode(meta)))
        elif state == states.RETRY and not hasattr(request, "started"):
            # Celery's parent has ended the run since the broker's connection was lost.
            self._write(lambda: self.store.interrupt(message_of(request, request.task), request.hostname))
        return encoded

    def on_chord_part_return(self, request: Context, state: str, result: Any, **kwargs: Any) -> None:
        """Count a member of a chord; not for a run that another one has superseded, whose result may be another."""
        if not getattr(request, "superseded", False):
            super().on_chord_part_return(request, state, result, **kwargs)

    def _write(self, call: Callable[[], None]) -> None:
        try:
            patiently(call, self.patience)
        except Reject:
            if current_process().name == "MainProcess":
                # There is no message to give back here; the record is left as it was.
                log.warning("the end of a task could not be written")
                return
            raise

    def _finish(
        self,
        request: Context,
        message: Message,
        status: Status,
        fields: Mapping[str, str | bytes],
        celery_result: str,
    ) -> None:
        written = self.store.finish(message, status, fields, celery_result, worker=request.hostname)
        self.settled = message.task_id if written == status else None
        if self.settled is None:
            request.superseded = True
            log.info("another run of this task has ended it", task_id=message.task_id, status=status)
