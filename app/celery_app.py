"""The Celery app: configuration only. Task modules are included by name, the API never imports them."""

from pathlib import Path

from celery import Celery

from app.contracts import Queue
from app.engine.queues import TASKS, run_limits, task_queues
from app.settings import Settings, get_settings


def task_modules() -> list[str]:
    """The names of the modules in app/tasks; nothing is imported."""
    return sorted(f"app.tasks.{path.stem}" for path in Path(__file__).with_name("tasks").glob("[!_]*.py"))


def create_celery(settings: Settings) -> Celery:
    """The app that workers run and tasks register with. Opens no connection."""
    redis_url = settings.redis_url.get_secret_value()
    app = Celery(
        "stack",
        task_cls="app.engine.task:Task",
        broker=settings.rabbitmq_url.get_secret_value(),
        backend=f"app.engine.backend.RecordBackend+{redis_url}",
        include=[*task_modules(), *settings.task_modules],
        set_as_current=False,
    )
    app.conf.update(
        # Read by the Task base class.
        progress_interval=settings.progress_interval,
        result_max_bytes=settings.result_max_bytes,
        # Read by the result backend.
        archive_url=settings.mongodb_url.get_secret_value(),
        archive_database=settings.mongodb_database,
        archive_timeout=settings.mongodb_timeout,
        look_after=settings.reconcile_after,
        run_limits=run_limits(settings),
        # Queues: ours alone, declared by engine/queues.py.
        task_queues=task_queues(max_length=settings.queue_max_length, delivery_limit=settings.queue_delivery_limit),
        task_default_queue=Queue.LIGHT,
        task_default_exchange=TASKS.name,
        task_default_exchange_type=TASKS.type,
        task_default_routing_key=Queue.LIGHT,
        task_create_missing_queues=False,
        # A message is acknowledged after its task has ended, and goes back to its queue if the worker dies.
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_acks_on_failure=False,  # a failure goes to the dead letters, its record says FAILURE already
        task_acks_on_timeout=True,
        worker_consumer="app.engine.consumer:Consumer",
        worker_prefetch_multiplier=1,
        worker_cancel_long_running_tasks_on_connection_loss=True,  # the broker redelivers them: two would run
        worker_soft_shutdown_timeout=settings.worker_soft_shutdown_timeout,
        worker_enable_soft_shutdown_on_idle=False,
        worker_max_tasks_per_child=settings.worker_max_tasks_per_child,
        worker_max_memory_per_child=settings.worker_max_memory_per_child,
        worker_hijack_root_logger=False,
        # The broker: wait for it for ever, but for no single answer.
        broker_heartbeat=30,
        broker_connection_timeout=settings.publish_timeout,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={"confirm_publish": True},
        # Results: the backend writes them with the record.
        result_expires=settings.celery_result_ttl,
        result_extended=False,
        result_backend_always_retry=True,
        result_backend_max_retries=10,  # of what Celery writes by itself; ours waits REDIS_PATIENCE
        result_chord_join_timeout=30,
        redis_socket_timeout=10,
        redis_socket_connect_timeout=settings.redis_timeout,
        redis_socket_keepalive=True,
        redis_backend_health_check_interval=25,
        redis_max_connections=settings.redis_pool_max,
        # Only JSON comes in or goes out, and nobody listens to Celery's events.
        accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        worker_send_task_events=False,
        enable_utc=True,
    )
    return app


celery = create_celery(get_settings())
