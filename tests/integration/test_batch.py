"""Batches against the running stack: each row is settled like a single submit."""

import asyncio
import os
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import httpx
import pymongo
import pytest
import redis

from app.context import Context
from app.engine.service import Accepted, Order
from app.problems import NotPublished
from deploy.native.ports import free_ports
from tests.integration.harness import Stack, finished, made_by, paused, problem, replica, wait_until

pytestmark = pytest.mark.integration

LIGHT = {"task": "count-words", "text": "to be or not to be"}


def send(api: httpx.Client, rows: list[Any], key: str | None = None) -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return api.post("/api/async/batch", json={"tasks": rows}, headers=headers)


def accepted(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 202, answer.text
    return [row["task_id"] for row in answer.json()["results"] if "task_id" in row]


def test_a_thousand_rows_all_succeed(api: httpx.Client, archive: pymongo.collection.Collection) -> None:
    answer = send(api, [{**LIGHT, "text": f"row {number}"} for number in range(1000)])
    task_ids = accepted(answer)
    assert (answer.json()["accepted"], answer.json()["refused"], len(set(task_ids))) == (1000, 0, 1000)
    wait_until(lambda: archive.count_documents({"task_id": {"$in": task_ids}}) == 1000, 90)
    ended = list(archive.find({"task_id": {"$in": task_ids}}))
    assert Counter((row["status"], row["attempts"]) for row in ended) == {("SUCCESS", 1): 1000}
    results = {row["task_id"]: row["result"]["characters"] for row in ended}
    assert [results[task_id] for task_id in task_ids] == [len(f"row {number}") for number in range(1000)]


def test_bad_rows_are_refused_and_good_ones_run(api: httpx.Client) -> None:
    rows = [LIGHT, {"data": "x", "iterations": 0}, {"task": "none"}, {"data": "x", "priority": "high"}, 7]
    answer = send(api, rows)
    document = answer.json()
    assert (document["accepted"], document["refused"]) == (2, 3)
    assert [row["status"] for row in document["results"]] == ["PENDING", 422, 422, "PENDING", 422]
    ended = [finished(api, task_id) for task_id in accepted(answer)]
    assert [(task["queue"], task["status"]) for task in ended] == [("light", "SUCCESS"), ("heavy.high", "SUCCESS")]
    problem(send(api, [{}, {"data": 1}]), 422, "invalid")


def test_rows_past_the_end_of_a_queue_are_refused_and_taken_by_a_repeat(stack: Stack, records: redis.Redis) -> None:
    key, rows = uuid4().hex, [{"data": "x", "iterations": 1, "priority": "low"}] * 8 + [LIGHT]
    with replica(stack, QUEUE_MAX_LENGTH="5") as (api, _):
        wait_until(lambda: records.zcard("queue:heavy.low:waiting") == 0)
        answer = send(api, rows, key)
        first = accepted(answer)
        results = answer.json()["results"]
        assert [row["status"] for row in results] == ["PENDING"] * 5 + [503] * 3 + ["PENDING"]
        assert {row["type"] for row in results[5:8]} == {"urn:problem:queue-full"}
        assert int(answer.headers["retry-after"]) >= 1
        assert "idempotent-replayed" not in answer.headers
        for task_id in first:
            finished(api, task_id)
        again = send(api, rows, key)
        everything = accepted(again)
        assert len(set(everything)) == 9
        assert [*everything[:5], everything[8]] == first
        assert "idempotent-replayed" not in again.headers
        assert send(api, rows, key).headers["idempotent-replayed"] == "true"
        for task_id in everything:
            assert finished(api, task_id)["attempts"] == 1


def test_a_full_queue_refuses_the_whole_batch(stack: Stack, records: redis.Redis) -> None:
    records.zadd("queue:heavy.low:waiting", {"of the test": "inf"})
    try:
        with replica(stack, QUEUE_MAX_LENGTH="1") as (api, _):
            answer = send(api, [{"data": "x", "iterations": 1, "priority": "low"}] * 3)
            problem(answer, 503, "queue-full")
            assert int(answer.headers["retry-after"]) >= 1
    finally:
        records.zrem("queue:heavy.low:waiting", "of the test")


def test_the_same_key_makes_no_second_task_of_a_row(api: httpx.Client) -> None:
    key, rows = uuid4().hex, [{**LIGHT, "text": str(number)} for number in range(3)]
    first = send(api, rows, key)
    second = send(api, rows, key)
    assert accepted(first) == accepted(second)
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    changed = send(api, [rows[0], LIGHT, rows[2], LIGHT], key)
    results = changed.json()["results"]
    assert [row["status"] for row in results] == ["PENDING", 422, "PENDING", "PENDING"]
    assert results[1]["type"] == "urn:problem:key-reused"
    assert [results[0]["task_id"], results[2]["task_id"]] == [accepted(first)[0], accepted(first)[2]]
    problem(send(api, [LIGHT, LIGHT], key), 422, "key-reused")


def test_a_batch_that_nginx_tries_twice_counts_once(stack: Stack) -> None:
    headers = {"X-Edge-Request-Id": uuid4().hex}
    answers = [
        httpx.post(f"{url}/api/async/batch", json={"tasks": [LIGHT] * 5}, headers=headers) for url in stack.replicas
    ]
    assert accepted(answers[0]) == accepted(answers[1])
    assert "idempotent-replayed" not in answers[1].headers


def test_fifty_equal_batches_at_once_make_each_task_once(stack: Stack, records: redis.Redis) -> None:
    key, request_id = uuid4().hex, uuid4().hex
    rows = [{**LIGHT, "text": str(number)} for number in range(10)]
    headers = {"Idempotency-Key": key, "X-Request-ID": request_id}

    def one(number: int) -> httpx.Response:
        url = [stack.url, *stack.replicas][number % 3]
        return httpx.post(f"{url}/api/async/batch", json={"tasks": rows}, headers=headers, timeout=30)

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(one, range(50)))
    (task_ids,) = {tuple(accepted(answer)) for answer in answers}
    assert len(set(task_ids)) == 10
    wait_until(lambda: {row["status"] for row in made_by(records, request_id).values()} == {"SUCCESS"})
    made = made_by(records, request_id).values()
    assert len(made) == 10
    # One publish a task: nobody took over from anybody.
    assert {(row["attempts"], row["publishes"]) for row in made} == {("1", "1")}


def test_a_broker_that_hangs_refuses_a_batch_that_is_then_sent_again(
    stack: Stack, api: httpx.Client, records: redis.Redis
) -> None:
    key, request_id = uuid4().hex, uuid4().hex
    headers = {"Idempotency-Key": key, "X-Request-ID": request_id}
    rows = [{**LIGHT, "text": str(number)} for number in range(200)]

    def post() -> httpx.Response:
        return api.post("/api/async/batch", json={"tasks": rows}, headers=headers)

    with paused(stack, "rabbitmq"):
        answer = post()
        problem(answer, 503, "not-published")
        assert int(answer.headers["retry-after"]) >= 1
    answer = wait_until(lambda: (again := post()).status_code == 202 and again.json()["refused"] == 0 and again, 60)
    task_ids = accepted(answer)
    assert len(set(task_ids)) == 200
    for task_id in task_ids:
        assert finished(api, task_id, 60)["status"] == "SUCCESS"
    made = made_by(records, request_id).values()
    assert Counter((row["status"], row["attempts"]) for row in made) == {("SUCCESS", "1"): 200}


def test_a_broker_that_is_away_leaves_no_record_of_a_batch(stack: Stack, records: redis.Redis) -> None:
    (port,) = free_ports(1)
    request_id = uuid4().hex
    with replica(stack, RABBITMQ_URL=f"amqp://guest:guest@127.0.0.1:{port}//", PUBLISH_TIMEOUT="1") as (api, _):
        answer = api.post("/api/async/batch", json={"tasks": [LIGHT] * 3}, headers={"X-Request-ID": request_id})
        problem(answer, 503, "not-published")
    assert made_by(records, request_id) == {}


async def test_a_row_that_the_broker_returns_fails_alone(api: httpx.Client, context: Context) -> None:
    orders = [
        Order("light.count_words", {"text": "a b"}, str(uuid4()), "", queue=queue)
        for queue in ("light", "nowhere", "light")
    ]
    outcomes = await context.tasks.submit_many(orders, request_id="unroutable")
    assert [type(outcome) for outcome in outcomes] == [Accepted, NotPublished, Accepted]
    assert await context.store.record(orders[1].task_id) == {}
    for order in (orders[0], orders[2]):
        assert finished(api, order.task_id)["status"] == "SUCCESS"


async def test_a_caller_that_goes_away_leaves_no_row_between_its_two_writes(
    stack: Stack, api: httpx.Client, context: Context
) -> None:
    orders = [Order("light.count_words", {"text": "a b"}, str(uuid4()), "") for _ in range(300)]
    with paused(stack, "redis"):
        submitting = asyncio.create_task(context.tasks.submit_many(orders, request_id="gone"))
        await asyncio.sleep(0.2)
        submitting.cancel()
        await asyncio.wait([submitting])
        assert submitting.cancelled()

    def known(task_id: str) -> bool:
        return api.get(f"/api/async/status/{task_id}").status_code == 200

    for order in orders:
        # In a thread: what was shielded needs this loop.
        await asyncio.to_thread(wait_until, lambda one=order: known(one.task_id))
        assert (await asyncio.to_thread(finished, api, order.task_id))["status"] == "SUCCESS"


def test_a_replica_that_dies_amid_a_batch_is_replaced_by_the_next(
    stack: Stack, api: httpx.Client, records: redis.Redis
) -> None:
    request_ids = [uuid4().hex for _ in range(6)]

    def one(request_id: str) -> httpx.Response:
        return api.post("/api/async/batch", json={"tasks": [LIGHT] * 20}, headers={"X-Request-ID": request_id})

    wait_until(lambda: records.zcard("queue:light:waiting") == 0)
    victim = stack.pid("api-1")
    with ThreadPoolExecutor(6) as pool:
        with paused(stack, "rabbitmq"):
            answers = [pool.submit(one, request_id) for request_id in request_ids]
            wait_until(lambda: records.zcard("queue:light:waiting") == 120)
            os.kill(victim, signal.SIGKILL)
        task_ids = [task_id for answer in answers for task_id in accepted(answer.result())]
    assert len(set(task_ids)) == 120
    for task_id in task_ids:
        assert finished(api, task_id, 60)["attempts"] == 1
    assert [len(made_by(records, request_id)) for request_id in request_ids] == [20] * 6
    wait_until(stack.settled, 60)
