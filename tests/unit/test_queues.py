import pytest

from app.contracts import HEAVY_QUEUES, SUBSCRIPTIONS, TASKS, Priority, Queue
from app.engine import queues


@pytest.fixture
def declared():
    return {queue.name: queue for queue in queues.task_queues(max_length=1000, delivery_limit=5)}


def test_there_is_one_queue_a_name(declared):
    assert list(declared) == ["heavy.high", "heavy", "heavy.low", "light"]


@pytest.mark.parametrize("name", list(Queue))
def test_task_queue_never_loses_a_message_and_is_bound(declared, name: Queue):
    queue = declared[name]
    assert queue.queue_arguments == {
        "x-queue-type": "quorum",
        "x-delivery-limit": 5,
        "x-max-length": 2000,  # the API refuses at 1,000; workers' retries need room above
        "x-overflow": "reject-publish",
        "x-dead-letter-exchange": "dead",
        "x-dead-letter-strategy": "at-least-once",
    }
    assert queue.durable
    assert not queue.exclusive
    assert not queue.auto_delete
    assert queue.routing_key == name
    assert queue.exchange.name == "tasks"
    assert queue.no_declare  # by Celery: `declare` does


def test_each_service_that_subscribes_has_a_queue_that_loses_nothing():
    declared = queues.event_queues(max_length=7, delivery_limit=5)
    assert [(queue.name, patterns) for queue, patterns in declared] == [
        (f"events.{service}", patterns) for service, patterns in SUBSCRIPTIONS.items()
    ]
    for queue, _ in declared:
        assert queue.queue_arguments == {
            "x-queue-type": "quorum",
            "x-delivery-limit": 5,
            "x-max-length": 7,
            "x-overflow": "reject-publish",
            "x-dead-letter-exchange": "dead",
            "x-dead-letter-strategy": "at-least-once",
        }
        assert queue.exchange.name == "events"
        assert queue.durable
        assert not queue.auto_delete


def test_dead_letters_are_kept_safely_and_without_an_end():
    queue = queues.dead_queue(max_length=77)
    assert queue.name == "dead"
    assert queue.exchange.name == "dead"
    # No dead letters of its own, and a delivery limit that is none: nothing leaves it but by being read.
    assert queue.queue_arguments == {
        "x-queue-type": "quorum",
        "x-max-length": 77,
        "x-overflow": "reject-publish",
        "x-delivery-limit": 1_000_000,
    }
    assert queue.durable


def test_exchanges_route_as_delays_and_dead_letters_need():
    # Delayed delivery binds its last exchange to ours, which works with a topic exchange only.
    assert (queues.TASKS.name, queues.TASKS.type, queues.TASKS.durable) == ("tasks", "topic", True)
    assert (queues.DEAD.name, queues.DEAD.type, queues.DEAD.durable) == ("dead", "fanout", True)


def test_every_priority_and_every_task_has_a_queue():
    assert set(HEAVY_QUEUES) == set(Priority)
    assert set(HEAVY_QUEUES.values()) | {contract.queue for contract in TASKS.values()} == set(Queue)
