"""What a Celery process runs: `celery -A app.worker worker -Q heavy.high,heavy,heavy.low -n heavy-1@%h`."""

import time
import warnings
from typing import Any

import structlog
from celery import bootsteps, signals
from celery.exceptions import SecurityWarning
from celery.worker import state as worker_state
from celery.worker.consumer import Consumer
from celery.worker.control import control_command

from app.celery_app import celery
from app.contracts import TASKS
from app.engine.backend import RecordBackend
from app.engine.queues import BROKER_ERRORS, declare
from app.settings import get_settings
from app.telemetry import Pulse, configure_logging

log = structlog.get_logger(__name__)
settings = get_settings()
app = celery

# Ten lines at each start of a developer's stack that root runs; the image runs as nobody in particular.
warnings.filterwarnings("ignore", category=SecurityWarning)


class Alive(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Touches ALIVE_FILE while the worker's loop turns and its consumer stands."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Consumer, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._pulse = Pulse(settings.alive_file)
        self._timer: Any = None

    def start(self, consumer: Consumer) -> None:
        """Begin with the consumer, also after each reconnect."""
        self._pulse.beat()
        self._timer = consumer.timer.call_repeatedly(Pulse.interval, self._pulse.beat)

    def stop(self, consumer: Consumer) -> None:
        """End with the consumer: a worker without a connection is not well."""
        if self._timer is not None:
            consumer.timer.cancel(self._timer)


app.steps["consumer"].add(Alive)


@control_command(args=[("task_id", str)])
def end_run(state: Any, task_id: str) -> dict[str, str]:
    """Kill the process that runs a task. After a `revoke` every worker would refuse its replay, too, for hours."""
    request = worker_state.requests.get(task_id)
    if request is None or request not in worker_state.active_requests:
        return {"ok": "it does not run here"}
    request.terminate(state.consumer.pool, signal="TERM")
    return {"ok": "its process was told to end"}


@signals.setup_logging.connect
def set_up_logging(**_: Any) -> None:
    """Our logging in place of Celery's; its two lines a task, and httpx's a call, say less than ours."""
    configure_logging(settings, quiet=("celery.app.trace", "celery.worker.strategy", "httpx"))


@signals.worker_process_init.connect
def be_patient(**_: Any) -> None:
    """Let the processes that run tasks wait for Redis."""
    RecordBackend.patience = settings.redis_patience


@signals.worker_init.connect
def refuse_missing_tasks(**_: Any) -> None:
    """Do not start without a task that the API accepts: its messages would only fail here."""
    missing = sorted(set(TASKS) - set(app.tasks))
    if missing:
        raise SystemExit(f"app/contracts.py names tasks that no module in app/tasks registers: {', '.join(missing)}")


@signals.worker_init.connect
def declare_queues(**_: Any) -> None:
    """Wait for the broker and declare the queues before anything is consumed."""
    while True:
        try:
            declare(settings)
        except BROKER_ERRORS as error:
            log.warning("waiting for the broker", error=str(error))
            time.sleep(2)
        else:
            return
