import asyncio
from typing import Any

import aio_pika
import orjson
import pytest
from amqp.serialization import loads

from app.celery_app import create_celery
from app.engine.publisher import RECORD, Publisher, Refused, envelope
from app.engine.state import Message
from app.settings import Settings

MESSAGE = Message(
    task_id="7e324e54-153a-8efa-8e48-4085fddbe031",
    name="heavy.process_data",
    queue="heavy.high",
    payload={"data": "é\0😀", "iterations": 3},
    digest="d" * 64,
    request_id="r-1",
    epoch=2,
    retries=1,
    publish="f" * 32,
    created_at=1_700_000_000_123,
)
# What tells who sent it and what may be logged of it: ours on purpose.
OURS = {"origin", "argsrepr", "kwargsrepr", RECORD}


@pytest.fixture
def of_celery(settings: Settings) -> Any:
    """The same task's message as Celery makes it."""
    return create_celery(settings).amqp.as_task_v2(
        MESSAGE.task_id, MESSAGE.name, args=[], kwargs={"payload": MESSAGE.payload}, retries=MESSAGE.retries
    )


def without_ours(headers: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in headers.items() if name not in OURS}


def test_headers_are_those_of_celery(of_celery: Any):
    assert without_ours(envelope(MESSAGE).headers) == without_ours(of_celery.headers)
    assert set(envelope(MESSAGE).headers) == {*of_celery.headers, RECORD}


def test_body_is_that_of_celery(of_celery: Any):
    args, kwargs, embed = of_celery.body
    assert orjson.loads(envelope(MESSAGE).body) == [list(args), kwargs, embed]


def test_properties_are_those_of_celery(of_celery: Any):
    message = envelope(MESSAGE)
    assert message.correlation_id == of_celery.properties["correlation_id"] == MESSAGE.task_id
    assert (message.reply_to or "") == of_celery.properties["reply_to"]
    assert message.content_type == "application/json"
    assert message.content_encoding == "utf-8"


def test_message_survives_a_restart_of_the_broker():
    assert envelope(MESSAGE).delivery_mode is aio_pika.DeliveryMode.PERSISTENT


def test_payload_shows_in_no_header():
    headers = envelope(MESSAGE).headers
    assert (headers["argsrepr"], headers["kwargsrepr"], headers["origin"]) == ("()", "{...}", "api")
    assert "😀" not in repr(headers)


def test_record_header_is_what_a_record_is_made_of():
    assert envelope(MESSAGE).headers[RECORD] == {
        "epoch": 2,
        "publish": "f" * 32,
        "queue": "heavy.high",
        "digest": "d" * 64,
        "request_id": "r-1",
        "owner": "",
        "created_at": 1_700_000_000_123,
        "workflow": "",
    }


def test_workers_read_the_headers_as_they_were_sent():
    # Encoded by aio-pika's library, decoded by Celery's: the property flags, content type and encoding, the headers.
    (_, _, headers), _ = loads("ssF", envelope(MESSAGE).properties.marshal(), 2)
    assert headers == envelope(MESSAGE).headers


async def test_those_who_waited_for_a_broker_in_vain_go_on_one_by_one():
    def refuse() -> None:
        raise OSError("away")

    ended, turns = [], 0

    async def publish(publisher: Publisher) -> None:
        (error,) = await publisher.publish_many([MESSAGE])
        assert isinstance(error, Refused)
        ended.append(turns)

    async with Publisher("amqp://127.0.0.1:9//", name="test", timeout=5, declare=refuse) as publisher:
        waiting = asyncio.gather(*(publish(publisher) for _ in range(100)))
        while not waiting.done():
            await asyncio.sleep(0)
            turns += 1
        await waiting
    assert len(set(ended)) == 100
