"""Exchanges and queues: what they are, and the one function that declares them.

Task queues are quorum queues bound to the topic exchange `tasks`. A message that is rejected or delivered too often
goes to the fanout exchange `dead`, at least once: the source keeps it until the queue `dead` has it. Delays are
RabbitMQ's own (Celery's native delayed delivery: 28 queues with a TTL of a power of two seconds each), never held
in a worker. Events go by the topic exchange `events` to a queue of each service that subscribes to them.

A queue that exists with other arguments is kept as it is, with a line in the log: RabbitMQ cannot change them, and
refusing to start would turn a changed limit into an outage. To apply new limits delete the (empty) queue.
"""

from collections.abc import Iterable

import structlog
from amqp.exceptions import AMQPError, PreconditionFailed
from kombu import Connection, Exchange, Queue
from kombu.exceptions import KombuError
from kombu.transport.native_delayed_delivery import (
    bind_queue_to_native_delayed_delivery_exchange,
    declare_native_delayed_delivery_exchanges_and_queues,
)

from app.contracts import SUBSCRIPTIONS, event_queue
from app.contracts import Queue as QueueName
from app.settings import Settings

TASKS = Exchange("tasks", type="topic", durable=True)
DEAD = Exchange("dead", type="fanout", durable=True)
EVENTS = Exchange("events", type="topic", durable=True)

# All that kombu and what is below it raise when the broker is away or refuses.
BROKER_ERRORS = (KombuError, AMQPError, OSError)

log = structlog.get_logger(__name__)


def _safe(*, max_length: int, delivery_limit: int) -> dict[str, object]:
    """The arguments of a queue that loses nothing."""
    return {
        "x-queue-type": "quorum",
        "x-delivery-limit": delivery_limit,
        "x-max-length": max_length,
        # At-least-once dead-lettering works with reject-publish alone: drop-head downgrades it without a word.
        "x-overflow": "reject-publish",
        "x-dead-letter-exchange": DEAD.name,
        "x-dead-letter-strategy": "at-least-once",
    }


def task_queues(*, max_length: int, delivery_limit: int) -> list[Queue]:
    """The task queues; the broker's own bound is twice the API's, because it refuses workers' retries too."""
    arguments = _safe(max_length=2 * max_length, delivery_limit=delivery_limit)
    # no_declare: `declare` below is the only place, Celery's workers would stop over a changed argument.
    return [Queue(name, TASKS, routing_key=name, queue_arguments=arguments, no_declare=True) for name in QueueName]


def event_queues(*, max_length: int, delivery_limit: int) -> list[tuple[Queue, tuple[str, ...]]]:
    """The queues of the services that subscribe to events, with the patterns that bind them."""
    arguments = _safe(max_length=max_length, delivery_limit=delivery_limit)
    return [
        (Queue(event_queue(service), EVENTS, queue_arguments=arguments, no_declare=True), patterns)
        for service, patterns in SUBSCRIPTIONS.items()
    ]


def dead_queue(*, max_length: int) -> Queue:
    """Where dead letters wait for beat; when it is full they wait in their own queue instead."""
    arguments = {
        "x-queue-type": "quorum",
        "x-max-length": max_length,
        "x-overflow": "reject-publish",
        # RabbitMQ 4 drops what has come back 20 times unless told otherwise; beat gives back what it could not keep.
        "x-delivery-limit": 1_000_000,
    }
    return Queue(DEAD.name, DEAD, queue_arguments=arguments)


def run_limits(settings: Settings) -> dict[str, float]:
    """The seconds after which a run of a task of each queue has been ended."""
    return {
        name: settings.light_time_limit if name is QueueName.LIGHT else settings.heavy_time_limit for name in QueueName
    }


def declare(settings: Settings) -> None:
    """Declare everything, which may be there already. Blocking: some 200 round trips to the broker.

    Each step is bounded by PUBLISH_TIMEOUT. Raises one of `BROKER_ERRORS` when the broker is away or
    refuses.
    """
    timeout = settings.publish_timeout
    options = {"read_timeout": timeout, "write_timeout": timeout}
    url = settings.rabbitmq_url.get_secret_value()
    with Connection(url, connect_timeout=timeout, transport_options=options) as connection:
        connection.connect()  # fails at once, where to use a channel would try again and again
        TASKS.bind(connection.default_channel).declare()
        DEAD.bind(connection.default_channel).declare()
        EVENTS.bind(connection.default_channel).declare()
        _declare_queue(connection, dead_queue(max_length=settings.dead_letter_max_length))
        declare_native_delayed_delivery_exchanges_and_queues(connection, "quorum")
        for queue in task_queues(max_length=settings.queue_max_length, delivery_limit=settings.queue_delivery_limit):
            _declare_queue(connection, queue)
            bind_queue_to_native_delayed_delivery_exchange(connection, queue)
        for queue, patterns in event_queues(
            max_length=settings.event_queue_max_length, delivery_limit=settings.queue_delivery_limit
        ):
            _declare_queue(connection, queue, patterns)


def _declare_queue(connection: Connection, queue: Queue, patterns: Iterable[str] = ()) -> None:
    # A channel of its own each: the broker closes the channel of a refused declaration.
    channel = connection.channel()
    bound = queue.bind(channel)
    try:
        bound.queue_declare()
    except PreconditionFailed as error:
        log.warning("queue exists with other arguments and is kept", queue=queue.name, reason=str(error))
        channel = connection.channel()
        bound = queue.bind(channel)
    for pattern in patterns or (queue.routing_key,):
        bound.bind_to(queue.exchange, pattern)
    channel.close()
