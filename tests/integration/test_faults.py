"""What the stack does when a part of it is killed, stopped or away."""

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import httpx
import pymongo
import pytest
import redis

from app.context import Context
from deploy.native.supervision import Supervisor
from tests.integration.harness import Stack, finished, paused, problem, submit, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def healed(stack: Stack, api: httpx.Client) -> Iterator[None]:
    """Each test leaves a healthy stack to the next."""
    yield
    wait_until(stack.settled, 60)
    wait_until(lambda: api.get("/health").json()["status"] == "healthy", 60)


def post(client: httpx.Client, **fields: object) -> httpx.Response:
    return client.post("/api/async/process", json={"data": uuid4().hex, "iterations": 40, **fields})


def test_two_hundred_submits_survive_a_killed_replica_and_a_killed_worker(stack: Stack, api: httpx.Client) -> None:
    answers: list[httpx.Response] = []
    kill_at = {60: "api-1", 120: "heavy-1"}
    lock = threading.Lock()

    def one(number: int) -> None:
        if number in kill_at:
            os.kill(stack.pid(kill_at[number]), signal.SIGKILL)
        for _ in range(10):
            answer = post(api)
            with lock:
                answers.append(answer)
            if answer.status_code == 202:
                return
            time.sleep(int(answer.headers["retry-after"]))

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(one, range(200)))
    accepted = [answer.json()["task_id"] for answer in answers if answer.status_code == 202]
    for answer in answers:
        if answer.status_code != 202:
            assert answer.headers["content-type"] == "application/problem+json"
            assert int(answer.headers["retry-after"]) >= 1
    assert len(set(accepted)) == 200
    assert Counter(finished(api, task_id, 60)["status"] for task_id in accepted) == {"SUCCESS": 200}


def test_a_thousand_tasks_of_fifty_clients_all_end_and_are_archived(stack: Stack, api: httpx.Client) -> None:
    def client(_: int) -> list[str]:
        with httpx.Client(base_url=stack.url, timeout=30) as own:
            return [submit(own, iterations=5) for _ in range(20)]

    with ThreadPoolExecutor(50) as pool:
        task_ids = [task_id for row in pool.map(client, range(50)) for task_id in row]
    assert len(set(task_ids)) == 1000
    assert Counter(finished(api, task_id, 60)["status"] for task_id in task_ids) == {"SUCCESS": 1000}
    with pymongo.MongoClient(stack.settings.mongodb_url.get_secret_value()) as database:
        results = database["stack"]["task_results"]
        with redis.Redis.from_url(stack.settings.redis_url.get_secret_value()) as records:
            wait_until(lambda: records.xlen("tasks:finished") == 0)
        archived = {row["task_id"] for row in results.find({"status": "SUCCESS"}, {"task_id": 1})}
    assert set(task_ids) <= archived


def test_the_event_loop_turns_while_the_broker_hangs(stack: Stack) -> None:
    """A request that waits for the broker must not make the replica's other requests wait."""
    replica = stack.replicas[0]
    body = {"data": "x", "iterations": 1}

    async def measure() -> tuple[list[httpx.Response], list[float]]:
        async with httpx.AsyncClient(base_url=replica, timeout=30) as client:
            waiting = [asyncio.create_task(client.post("/api/async/process", json=body)) for _ in range(20)]
            lags = []
            while not all(task.done() for task in waiting):
                began = time.monotonic()
                (await client.get("/health/live")).raise_for_status()
                lags.append(time.monotonic() - began)
                await asyncio.sleep(0.02)
            return [task.result() for task in waiting], lags

    with paused(stack, "rabbitmq"):
        answers, lags = asyncio.run(measure())
    for answer in answers:
        problem(answer, 503, "not-published")
        assert int(answer.headers["retry-after"]) >= 1
    # A blocking publish would have held the loop for PUBLISH_TIMEOUT (2 s); the bound leaves room for a busy machine.
    assert len(lags) > 20
    assert sorted(lags)[len(lags) // 2] < 0.1
    assert max(lags) < 1


def test_what_was_not_published_is_known_and_can_be_sent_again(stack: Stack, api: httpx.Client) -> None:
    headers = {"Idempotency-Key": uuid4().hex}
    body = {"data": "again", "iterations": 5}
    with paused(stack, "rabbitmq"):
        problem(api.post("/api/async/process", json=body, headers=headers), 503, "not-published")
    answer = wait_until(
        lambda: (again := api.post("/api/async/process", json=body, headers=headers)).status_code == 202 and again
    )
    document = finished(api, answer.json()["task_id"])
    assert (document["status"], document["error"], document["attempts"]) == ("SUCCESS", None, 1)


def test_items_and_status_are_served_without_the_broker(stack: Stack, api: httpx.Client) -> None:
    task_id = submit(api)
    finished(api, task_id)
    supervisor = Supervisor(stack.layout)
    supervisor.stop(["rabbitmq"])
    try:
        # Longer than any time-out, so that every way of not reaching the broker is met.
        until = time.monotonic() + 8
        while time.monotonic() < until:
            problem(post(api), 503, "not-published")
            assert api.get("/api/items").status_code == 200
            assert api.get(f"/api/async/status/{task_id}").status_code == 200
            assert api.get("/health").json()["services"]["rabbitmq"] == "disconnected"
            time.sleep(0.2)
    finally:
        supervisor.start("rabbitmq")
    answer = wait_until(lambda: (again := post(api)).status_code == 202 and again, 60)
    finished(api, answer.json()["task_id"], 60)
    with redis.Redis.from_url(stack.settings.redis_url.get_secret_value()) as records:
        assert records.zcard("queue:heavy:waiting") == 0


def test_a_killed_redis_is_used_again_at_once(stack: Stack, api: httpx.Client) -> None:
    with ThreadPoolExecutor(30) as pool:
        assert {answer.status_code for answer in pool.map(lambda _: post(api), range(60))} == {202}
        redis_pid = stack.pid("redis")
        os.kill(redis_pid, signal.SIGKILL)
        wait_until(lambda: api.get("/health").json()["services"]["redis"] == "disconnected" or stack.pid("redis"))
        wait_until(lambda: stack.pid("redis") not in (0, redis_pid))
        wait_until(lambda: post(api).status_code == 202)
        answers = list(pool.map(lambda _: post(api), range(60)))
    assert {answer.status_code for answer in answers} == {202}
    assert Counter(finished(api, answer.json()["task_id"], 60)["status"] for answer in answers) == {"SUCCESS": 60}


async def test_a_retry_survives_a_redis_that_hangs(stack: Stack, api: httpx.Client, context: Context) -> None:
    accepted = await context.tasks.submit(
        "test.late", {"seconds": 1.0}, task_id=str(uuid4()), digest="", request_id="late", queue="heavy"
    )
    wait_until(lambda: api.get(f"/api/async/status/{accepted.task_id}").json()["status"] == "STARTED")
    with paused(stack, "redis"):
        time.sleep(13)  # past the worker's time-out of 10 s: the call takes effect, and its answer is lost
    document = finished(api, accepted.task_id, 60)
    assert (document["status"], document["result"]) == ("SUCCESS", {"retries": 1})


def test_items_are_served_without_redis_and_tasks_from_the_archive(stack: Stack, api: httpx.Client) -> None:
    task_id = submit(api)
    finished(api, task_id)
    with pymongo.MongoClient(stack.settings.mongodb_url.get_secret_value()) as database:
        wait_until(lambda: database["stack"]["task_results"].find_one({"task_id": task_id}))
    with paused(stack, "redis"):
        assert api.get("/api/items").status_code == 200
        health = wait_until(lambda: (seen := api.get("/health")).json()["status"] == "degraded" and seen)
        assert health.status_code == 200
        assert health.json()["services"] == {"mongodb": "connected", "redis": "disconnected", "rabbitmq": "connected"}
        problem(post(api), 503, "unavailable")
        assert api.get(f"/api/async/status/{task_id}").json()["status"] == "SUCCESS"
        problem(api.get(f"/api/async/status/{uuid4()}"), 503, "unavailable")


def test_tasks_are_served_without_the_database(stack: Stack, api: httpx.Client) -> None:
    with paused(stack, "database"):
        task_id = submit(api)
        assert finished(api, task_id)["status"] == "SUCCESS"
        problem(api.get("/api/items"), 503, "unavailable")
        assert api.get("/health").json()["status"] == "degraded"
    with pymongo.MongoClient(stack.settings.mongodb_url.get_secret_value()) as database:
        wait_until(lambda: database["stack"]["task_results"].find_one({"task_id": task_id}), 60)


def test_a_worker_waits_for_redis_and_then_ends_its_task(stack: Stack, api: httpx.Client) -> None:
    task_id = submit(api, iterations=3000)
    wait_until(lambda: api.get(f"/api/async/status/{task_id}").json()["status"] == "PROGRESS")
    with paused(stack, "redis"):
        time.sleep(3)
    document = finished(api, task_id, 60)
    assert (document["status"], document["attempts"]) == ("SUCCESS", 1)


def test_a_lost_record_is_made_again_from_its_message(stack: Stack, api: httpx.Client) -> None:
    task_id = submit(api, iterations=4000)
    wait_until(lambda: api.get(f"/api/async/status/{task_id}").json()["status"] == "PROGRESS")
    with redis.Redis.from_url(stack.settings.redis_url.get_secret_value()) as records:
        records.flushall()
    # Whether there is such a task cannot be said: it may wait in a queue.
    problem(api.get(f"/api/async/status/{task_id}"), 503, "unavailable")
    problem(api.get(f"/api/async/status/{uuid4()}"), 503, "unavailable")
    wait_until(lambda: api.get(f"/api/async/status/{task_id}").status_code == 200)
    document = finished(api, task_id)
    assert (document["status"], document["result"]["total_processed"]) == ("SUCCESS", 4000)
    with pymongo.MongoClient(stack.settings.mongodb_url.get_secret_value()) as database:
        wait_until(lambda: database["stack"]["task_results"].find_one({"task_id": task_id}), 60)
    wait_until(lambda: api.get(f"/api/async/status/{uuid4()}").status_code == 404)


def test_a_killed_child_makes_its_task_start_again(stack: Stack, api: httpx.Client) -> None:
    task_id = submit(api, iterations=6000)
    wait_until(lambda: api.get(f"/api/async/status/{task_id}").json()["status"] == "PROGRESS")
    for child in stack.processes("heavy-1")[1:]:
        child.kill()
    document = finished(api, task_id, 60)
    assert (document["status"], document["attempts"]) == ("SUCCESS", 2)


def test_a_killed_beat_loses_no_result(stack: Stack, api: httpx.Client) -> None:
    os.kill(stack.pid("beat"), signal.SIGKILL)
    task_ids = [submit(api) for _ in range(20)]
    for task_id in task_ids:
        assert finished(api, task_id)["status"] == "SUCCESS"
    with redis.Redis.from_url(stack.settings.redis_url.get_secret_value()) as records:
        wait_until(lambda: records.xlen("tasks:finished") == 0, 60)
    with pymongo.MongoClient(stack.settings.mongodb_url.get_secret_value()) as database:
        results = database["stack"]["task_results"]
        assert all(results.find_one({"task_id": task_id}) for task_id in task_ids)


async def test_a_worker_that_is_told_to_stop_hands_its_task_over(
    stack: Stack, api: httpx.Client, context: Context
) -> None:
    accepted = await context.tasks.submit(
        "test.steps", {"steps": 80}, task_id=str(uuid4()), digest="", request_id="stopping", queue="heavy"
    )
    wait_until(lambda: api.get(f"/api/async/status/{accepted.task_id}").json()["status"] == "PROGRESS")
    os.kill(stack.pid("heavy-1"), signal.SIGTERM)
    document = finished(api, accepted.task_id, 60)
    assert (document["status"], document["attempts"]) == ("SUCCESS", 2)
