"""Celery's consumer, but what is no task goes to the dead letters: it neither ends the worker nor vanishes."""

from collections.abc import Callable
from typing import Any

import structlog
from celery.worker import consumer
from kombu import Message

from app.engine.message import RECORD, body_fault, header_fault
from app.engine.queues import BROKER_ERRORS

log = structlog.get_logger(__name__)


class Consumer(consumer.Consumer):  # type: ignore[misc]  # Celery has no types
    """The consumer that `worker_consumer` names."""

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Message], None]:
        """Celery's handler of messages behind a look at their envelope."""
        handle = super().create_task_handler(*args, **kwargs)

        def on_message(message: Message) -> None:
            fault = header_fault(message.headers)
            # Those that our publisher wrote have a record, and a body that it wrote as well.
            if fault is None and RECORD not in message.headers:
                fault = body_fault(message.body)
            if fault is None:
                handle(message)
                return
            log.error("a message that is no task was rejected", fault=fault)
            message.reject_log_error(log, BROKER_ERRORS)

        return on_message
