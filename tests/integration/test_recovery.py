"""Messages that get lost are published again; messages that come twice have one effect."""

import asyncio
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from uuid import uuid4

import aio_pika
import httpx
import psutil
import pytest
import redis
from kombu import Connection

from app.context import Context
from app.engine.identity import ANYONE
from app.engine.message import Message
from app.engine.reconciler import Reconciler
from deploy.native.supervision import Supervisor
from tests.integration.harness import Stack, bearer, finished, new_key, problem, start, submit, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture
def records(stack: Stack) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(stack.settings.redis_url.get_secret_value(), decode_responses=True) as client:
        yield client


def orphan(name: str = "light.count_words", queue: str = "light") -> Message:
    """A task whose record is written and whose message never leaves."""
    return Message.new(
        task_id=str(uuid4()), name=name, queue=queue, payload={"text": "a b"}, digest="d", request_id="orphan"
    )


async def test_a_replica_that_dies_between_record_and_message_loses_no_task(
    api: httpx.Client, context: Context
) -> None:
    lost = [orphan() for _ in range(20)]
    for message in lost:
        await context.store.create(message, lease=0.2)
    documents = [finished(api, message.task_id) for message in lost]
    assert {(row["status"], row["attempts"]) for row in documents} == {("SUCCESS", 1)}


async def test_two_reconcilers_publish_a_lost_task_once(
    stack: Stack, api: httpx.Client, context: Context, records: redis.Redis
) -> None:
    supervisor = Supervisor(stack.layout)
    supervisor.stop(["beat", "light-1"])
    try:
        lost = [orphan() for _ in range(50)]
        for message in lost:
            await context.store.create(message, lease=0.05)
        await asyncio.sleep(0.1)
        settings = stack.settings.model_copy(update={"reconcile_after": 60.0, "reconcile_batch": 1000})
        rivals = [Reconciler(context.store, context.publisher, context.results, settings, lease=5) for _ in range(3)]
        assert all(await asyncio.gather(*(rival.round() for rival in rivals)))
        assert {records.hget(f"task:{message.task_id}", "publishes") for message in lost} == {"2"}
    finally:
        supervisor.start("light-1")
        supervisor.start("beat")
    assert {finished(api, message.task_id)["status"] for message in lost} == {"SUCCESS"}


async def test_what_waits_in_line_is_left_alone(api: httpx.Client, context: Context, records: redis.Redis) -> None:
    busy = [await start(context, "test.steps", "heavy", {"steps": 100}) for _ in range(2)]
    waiting = [submit(api) for _ in range(8)]
    for task_id in waiting:
        finished(api, task_id)
    assert {records.hget(f"task:{task_id}", "publishes") for task_id in [*busy, *waiting]} == {"1"}


def test_a_broker_that_lost_its_messages_loses_no_task(stack: Stack, api: httpx.Client) -> None:
    supervisor = Supervisor(stack.layout)
    supervisor.stop(["heavy-1"])
    try:
        task_ids = [submit(api) for _ in range(20)]
        with Connection(stack.settings.rabbitmq_url.get_secret_value()) as connection:
            assert connection.default_channel.queue_purge("heavy") == 20
    finally:
        supervisor.start("heavy-1")
    assert Counter(finished(api, task_id, 60)["status"] for task_id in task_ids) == {"SUCCESS": 20}


@pytest.mark.timeout(240)
async def test_a_broker_that_starts_empty_loses_no_task(stack: Stack, api: httpx.Client, context: Context) -> None:
    retrying = await start(context, "test.flaky", "light", {"failures": 5})
    supervisor = Supervisor(stack.layout)
    wait_until(lambda: api.get(f"/api/async/status/{retrying}").json()["status"] == "RETRY")
    task_ids = [submit(api, iterations=200) for _ in range(20)]
    supervisor.stop(["rabbitmq"])
    shutil.rmtree(stack.layout.data("rabbitmq") / "mnesia")
    supervisor.start("rabbitmq")
    for task_id in [*task_ids, retrying]:
        assert finished(api, task_id, 120)["status"] == "SUCCESS"


async def test_a_run_whose_worker_and_message_are_gone_is_started_again(
    api: httpx.Client, context: Context, records: redis.Redis
) -> None:
    message = orphan()
    await context.store.create(message, lease=60)
    await context.store.confirm(message)
    records.hset(f"task:{message.task_id}", mapping={"status": "PROGRESS", "publish": message.publish, "attempts": 1})
    records.zadd("tasks:open", {message.task_id: 1})  # its time limit is over
    document = finished(api, message.task_id)
    assert (document["status"], document["attempts"]) == ("SUCCESS", 2)


async def test_a_late_message_of_a_task_that_only_the_archive_knows_has_no_effect(
    api: httpx.Client, context: Context, records: redis.Redis
) -> None:
    cancelled, done = orphan("test.hooked"), orphan()
    for message in (cancelled, done):
        created = await context.store.create(message, lease=60)
        await context.store.confirm(message)
        assert created.outcome == "created"
    assert await context.tasks.cancel(cancelled.task_id, ANYONE) == "CANCELLED"
    await context.publisher.publish(done)
    assert finished(api, done.task_id)["status"] == "SUCCESS"
    for message in (cancelled, done):
        wait_until(lambda message=message: records.ttl(f"task:{message.task_id}") > 0)
        records.delete(f"task:{message.task_id}")
        await context.publisher.publish(message)
    later = await start(context, "light.count_words", "light", {"text": "after"})
    finished(api, later)
    await asyncio.sleep(0.5)
    for message in (cancelled, done):
        assert not records.exists(f"task:{message.task_id}")
    assert api.get(f"/api/async/status/{cancelled.task_id}").json()["status"] == "CANCELLED"


@pytest.mark.timeout(180)
async def test_a_redelivery_while_the_first_run_lives_has_one_effect(
    stack: Stack, api: httpx.Client, context: Context, records: redis.Redis
) -> None:
    stack.run("scale", "worker=2")
    task_id = await start(context, "test.effect", "heavy", {"steps": 60})
    wait_until(lambda: api.get(f"/api/async/status/{task_id}").json()["status"] == "PROGRESS")
    name = records.hget(f"task:{task_id}", "worker").partition("@")[0]
    frozen = stack.processes(name)
    for process in frozen:
        process.send_signal(signal.SIGSTOP)
    try:
        close_connections(stack, frozen[0].pid)
        wait_until(lambda: records.hget(f"task:{task_id}", "attempts") == "2")
    finally:
        for process in frozen:
            process.send_signal(signal.SIGCONT)
    document = finished(api, task_id, 60)
    assert (document["status"], document["attempts"]) == ("SUCCESS", 2)
    wait_until(stack.settled, 60)
    assert records.lrange(f"effect:{task_id}", 0, -1) == ["success"]
    stack.run("scale", "worker=1")


async def test_an_old_attempt_that_comes_after_a_replay_has_no_effect(
    api: httpx.Client, context: Context, records: redis.Redis
) -> None:
    task_id = await start(context, "test.hooked", "light", {"failures": 1_000})
    finished(api, task_id)
    old = Message.of_record(task_id, records.hgetall(f"task:{task_id}"))
    old = replace(old, publish=records.hget(f"task:{task_id}", "publish"))
    letter = None
    while letter is None:
        letter = await context.database["dead_letters"].find_one({"task_id": task_id})
    await asyncio.gather(context.tasks.replay(letter, by="test"), *(context.publisher.publish(old) for _ in range(10)))
    wait_until(lambda: records.hget(f"task:{task_id}", "epoch") == "2")
    document = finished(api, task_id)
    assert (document["status"], document["attempts"]) == ("FAILURE", 4)
    wait_until(lambda: records.lrange(f"hooks:{task_id}", 0, -1) == ["retry", "failure"] * 2)


async def test_a_duplicate_inside_a_chord_neither_doubles_nor_freezes_it(
    stack: Stack, api: httpx.Client, context: Context, records: redis.Redis
) -> None:
    connection = await aio_pika.connect(stack.settings.rabbitmq_url.get_secret_value())
    async with connection:
        channel = await connection.channel()
        copies = await channel.declare_queue(exclusive=True)
        await copies.bind("tasks", routing_key="light")
        exchange = await channel.get_exchange("tasks", ensure=False)
        chord_id = await start(context, "test.chord", "light", {"size": 3})
        members = []
        while len(members) < 3:
            message = await copies.get(timeout=20, fail=False)
            if message is not None and message.headers["task"] == "test.member":
                members.append(message)
            await asyncio.sleep(0.01)
        body_id = f"{chord_id}-body"

        async def repeat(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            copy = aio_pika.Message(
                message.body, headers=message.headers, content_type="application/json", content_encoding="utf-8",
                correlation_id=message.correlation_id, reply_to="", delivery_mode=2,
            )  # fmt: skip
            await exchange.publish(copy, routing_key="light")

        # At once, while they run; again, when the first ones have ended; and once more when all is over.
        for message in members:
            await repeat(message)
        wait_until(lambda: api.get(f"/api/async/status/{members[1].headers['id']}").json()["status"] == "SUCCESS")
        for message in members:
            await repeat(message)
        wait_until(lambda: records.hget(f"task:{body_id}", "status") == "SUCCESS")
        for message in members:
            await repeat(message)
        after = await start(context, "light.count_words", "light", {"text": "after"})
        finished(api, after)
        await asyncio.sleep(0.5)
    assert records.get(f"body:{body_id}") == "1"
    assert records.hget(f"task:{body_id}", "result") == "[0,1,2]"
    for message in members:
        key = f"effect:{message.headers['id']}"
        wait_until(lambda key=key: records.lrange(key, 0, -1) == ["success"])


async def test_a_task_that_reports_no_progress_can_be_ended_by_force(
    stack: Stack, api: httpx.Client, context: Context
) -> None:
    worker = stack.pid("heavy-1")
    task_id = await start(context, "test.sleep", "heavy", {"seconds": 60})
    wait_until(lambda: api.get(f"/api/async/status/{task_id}").json()["status"] == "STARTED")
    problem(api.delete(f"/api/async/tasks/{task_id}?terminate=true"), 401, "unauthorized")
    answer = api.delete(f"/api/async/tasks/{task_id}?terminate=true", headers=bearer(new_key(stack, "--admin")))
    assert answer.json()["status"] == "CANCELLING"
    document = finished(api, task_id)
    assert (document["status"], document["error"]["type"]) == ("CANCELLED", "cancelled")
    assert finished(api, submit(api))["status"] == "SUCCESS"
    assert stack.pid("heavy-1") == worker


def close_connections(stack: Stack, pid: int) -> None:
    """Have the broker drop the connections of a process that does not answer."""
    ports = {row.laddr.port for row in psutil.Process(pid).net_connections("tcp")}
    management = httpx.Client(base_url=stack.management, auth=("guest", "guest"))
    with management:
        found = wait_until(
            lambda: [row for row in management.get("/api/connections").json() if row.get("peer_port") in ports]
        )
        for row in found:
            management.delete(f"/api/connections/{row['name']}").raise_for_status()


async def test_a_retry_is_held_back_by_the_broker_and_by_no_workers_clock(
    stack: Stack, api: httpx.Client, context: Context
) -> None:
    connection = await aio_pika.connect(stack.settings.rabbitmq_url.get_secret_value())
    async with connection:
        channel = await connection.channel()
        copies = await channel.declare_queue(exclusive=True)
        await copies.bind("tasks", routing_key="#.light")  # the delay's exchanges put its bits before the queue's name
        task_id = await start(context, "test.flaky", "light", {"failures": 1})
        assert (await asyncio.to_thread(finished, api, task_id))["status"] == "SUCCESS"
        messages = []
        while message := await copies.get(no_ack=True, fail=False):
            messages.append(message)
    headers = {message.headers["retries"]: message.headers for message in messages if message.headers["id"] == task_id}
    assert set(headers) == {0, 1}
    assert headers[1]["eta"] is None
