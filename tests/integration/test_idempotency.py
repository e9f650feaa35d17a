"""One request, one task: over three replicas, when one of them dies, and after Redis has forgotten it."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import httpx
import pymongo
import pytest
import redis

from app.context import Context
from app.engine.service import NOT_PUBLISHED
from tests.integration.harness import FINAL, Stack, finished, made_by, paused, problem, replica, wait_until

pytestmark = pytest.mark.integration

BODY = {"data": "once", "iterations": 5}


@pytest.fixture(scope="module")
def replicas(stack: Stack) -> Iterator[list[str]]:
    """The addresses of three replicas; the stack has two again afterwards."""
    stack.run("scale", "api=3")
    third = int(stack.replicas[1].rpartition(":")[2]) + 1
    yield [*stack.replicas, f"http://127.0.0.1:{third}"]
    stack.run("scale", "api=2")


@pytest.fixture(autouse=True)
def healed(stack: Stack) -> Iterator[None]:
    """Each test leaves a healthy stack to the next."""
    yield
    wait_until(stack.settled, 60)


def submit(url: str, body: dict[str, Any] = BODY, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"{url}/api/async/process", json=body, headers=named, timeout=30)


def ended(records: redis.Redis, request_ids: set[str]) -> list[dict[str, str]]:
    """The records that these requests made, once all are final and none but them is expected."""

    def look() -> list[dict[str, str]] | None:
        found = [record for request_id in request_ids for record in made_by(records, request_id).values()]
        return found if found and {record["status"] for record in found} <= FINAL else None

    return wait_until(look, 60)


@pytest.mark.parametrize("way", ["through nginx", "straight at the replicas"])
def test_fifty_equal_requests_over_three_replicas_make_one_task(
    stack: Stack, replicas: list[str], records: redis.Redis, way: str
) -> None:
    addresses = [stack.url] if way == "through nginx" else replicas
    key, request_id = uuid4().hex, uuid4().hex

    def one(number: int) -> httpx.Response:
        return submit(addresses[number % len(addresses)], idempotency_key=key, x_request_id=request_id)

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(one, range(50)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["task_id"] for answer in answers}) == 1
    assert sum(answer.headers.get("idempotent-replayed") == "true" for answer in answers) == 49
    for name in ("api-1", "api-2", "api-3"):
        wait_until(lambda name=name: request_id in stack.log(name))
    (record,) = ended(records, {request_id})
    assert (record["status"], record["attempts"], record["publishes"]) == ("SUCCESS", "1", "1")


def sent_again(stack: Stack, api: httpx.Client, records: redis.Redis, key: str, request_id: str) -> None:
    """The same request again makes, or finds, one task that runs once."""

    def taken() -> httpx.Response | None:
        answer = submit(stack.url, idempotency_key=key, x_request_id=request_id)
        if answer.status_code == 202:
            return answer
        problem(answer, 409, "in-flight")  # the lease of the dead is not over
        return None

    (task_id,) = {wait_until(taken).json()["task_id"] for _ in range(2)}
    finished(api, task_id)
    (record,) = ended(records, {request_id})
    assert (record["status"], record["attempts"]) == ("SUCCESS", "1")


def test_a_key_whose_replica_died_before_it_published_makes_one_task(
    stack: Stack, api: httpx.Client, records: redis.Redis
) -> None:
    key, request_id = uuid4().hex, uuid4().hex
    with socket.create_server(("127.0.0.1", 0)) as mute, ThreadPoolExecutor(1) as pool:
        broker = f"amqp://guest:guest@127.0.0.1:{mute.getsockname()[1]}//"
        with replica(stack, RABBITMQ_URL=broker, PUBLISH_TIMEOUT="5") as (lonely, process):
            hanging = pool.submit(submit, str(lonely.base_url), idempotency_key=key, x_request_id=request_id)
            wait_until(lambda: made_by(records, request_id))
            process.kill()
            with pytest.raises(httpx.TransportError):
                hanging.result()
    (left,) = made_by(records, request_id).values()
    assert (left["status"], left["attempts"]) == ("PENDING", "0")
    sent_again(stack, api, records, key, request_id)
    assert [record["publishes"] for record in made_by(records, request_id).values()] == ["2"]


def test_a_key_whose_replica_died_before_the_confirm_makes_one_task(
    stack: Stack, replicas: list[str], api: httpx.Client, records: redis.Redis
) -> None:
    key, request_id, victim = uuid4().hex, uuid4().hex, stack.pid("api-3")
    with ThreadPoolExecutor(1) as pool, paused(stack, "rabbitmq"):
        hanging = pool.submit(submit, replicas[2], idempotency_key=key, x_request_id=request_id)
        wait_until(lambda: made_by(records, request_id))
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            hanging.result()
    sent_again(stack, api, records, key, request_id)


def test_a_request_without_a_key_whose_replica_died_is_taken_by_the_next_one(
    stack: Stack, replicas: list[str], records: redis.Redis
) -> None:
    request_ids = [uuid4().hex for _ in range(3 * len(replicas))]
    victim = stack.pid("api-2")
    wait_until(lambda: records.zcard("queue:heavy:waiting") == 0)
    with ThreadPoolExecutor(len(request_ids)) as pool:
        with paused(stack, "rabbitmq"):
            # Nginx spreads them by how many a replica has: each has some.
            hanging = [pool.submit(submit, stack.url, x_request_id=request_id) for request_id in request_ids]
            wait_until(lambda: records.zcard("queue:heavy:waiting") == len(request_ids))
            os.kill(victim, signal.SIGKILL)
        answers = [answer.result() for answer in hanging]
    assert [answer.status_code for answer in answers] == [202] * len(request_ids)
    assert not any("idempotent-replayed" in answer.headers for answer in answers)
    assert len({answer.json()["task_id"] for answer in answers}) == len(request_ids)
    made = ended(records, set(request_ids))
    assert sorted(record["request_id"] for record in made) == sorted(request_ids)
    assert {(record["status"], record["attempts"]) for record in made} == {("SUCCESS", "1")}
    requests = [json.loads(line) for line in stack.log("nginx").splitlines() if any(one in line for one in request_ids)]
    # The victim had some, and another replica took them over.
    assert any(request["upstream"].startswith(f"{replicas[1].removeprefix('http://')}, ") for request in requests)


@pytest.fixture
def forgotten(
    stack: Stack, api: httpx.Client, records: redis.Redis, archive: pymongo.collection.Collection
) -> tuple[str, str]:
    """The key and the id of a task that has ended and that Redis no longer knows."""
    key = uuid4().hex
    task_id = submit(stack.url, idempotency_key=key).json()["task_id"]
    finished(api, task_id)
    wait_until(lambda: archive.find_one({"task_id": task_id}))
    wait_until(lambda: records.ttl(f"task:{task_id}") > 0)
    records.delete(f"task:{task_id}")
    return key, task_id


def test_a_key_that_redis_has_forgotten_is_known_to_the_archive(
    stack: Stack, api: httpx.Client, records: redis.Redis, forgotten: tuple[str, str]
) -> None:
    key, task_id = forgotten
    again = submit(stack.url, idempotency_key=key)
    assert (again.status_code, again.json()["task_id"]) == (202, task_id)
    assert again.headers["idempotent-replayed"] == "true"
    problem(submit(stack.url, {**BODY, "data": "other"}, idempotency_key=key), 422, "key-reused")
    assert not records.exists(f"task:{task_id}")
    assert api.get(f"/api/async/status/{task_id}").json()["status"] == "SUCCESS"
    # Another key has nothing to do with it.
    assert submit(stack.url, idempotency_key=uuid4().hex).json()["task_id"] != task_id


def test_rows_of_a_batch_that_redis_has_forgotten_are_known_to_the_archive(
    api: httpx.Client, records: redis.Redis, archive: pymongo.collection.Collection
) -> None:
    headers = {"Idempotency-Key": uuid4().hex}
    rows = [{"task": "count-words", "text": str(number)} for number in range(3)]

    def send(*further: dict[str, Any]) -> list[dict[str, Any]]:
        answer = api.post("/api/async/batch", json={"tasks": [*rows, *further]}, headers=headers)
        return answer.raise_for_status().json()["results"]

    first = [row["task_id"] for row in send()]
    wait_until(lambda: archive.count_documents({"task_id": {"$in": first}}) == 3)
    wait_until(lambda: all(records.ttl(f"task:{task_id}") > 0 for task_id in first))
    records.delete(*(f"task:{task_id}" for task_id in first))
    again = send({"data": "new", "iterations": 1})
    assert [row["task_id"] for row in again[:3]] == first
    assert not any(records.exists(f"task:{task_id}") for task_id in first)
    assert finished(api, again[3]["task_id"])["status"] == "SUCCESS"


def test_a_database_that_hangs_refuses_no_key(stack: Stack, api: httpx.Client, records: redis.Redis) -> None:
    key = uuid4().hex
    with paused(stack, "database"):
        answer = submit(stack.url, idempotency_key=key)
        assert (answer.status_code, "idempotent-replayed" in answer.headers) == (202, False)
        again = submit(stack.url, idempotency_key=key)
        assert (again.json()["task_id"], again.headers["idempotent-replayed"]) == (answer.json()["task_id"], "true")
        assert finished(api, answer.json()["task_id"])["status"] == "SUCCESS"
    wait_until(lambda: records.xlen("tasks:finished") == 0, 60)


async def test_what_was_never_published_is_made_again_when_redis_has_forgotten_it(
    stack: Stack, api: httpx.Client, records: redis.Redis, context: Context
) -> None:
    key, request_id = uuid4().hex, uuid4().hex
    with paused(stack, "rabbitmq"):
        problem(submit(stack.url, idempotency_key=key, x_request_id=request_id), 503, "not-published")
    (task_id,) = made_by(records, request_id)
    wait_until(lambda: records.ttl(f"task:{task_id}") > 0, 60)
    assert (await context.results.known([task_id]))[task_id]["error"]["type"] == NOT_PUBLISHED
    records.delete(f"task:{task_id}")
    answer = wait_until(lambda: (again := submit(stack.url, idempotency_key=key)).status_code == 202 and again, 60)
    assert answer.json()["task_id"] == task_id
    assert "idempotent-replayed" not in answer.headers
    document = finished(api, task_id)
    assert (document["status"], document["attempts"]) == ("SUCCESS", 1)
    # And the archive takes the later one.
    wait_until(lambda: records.ttl(f"task:{task_id}") > 0, 60)
    records.delete(f"task:{task_id}")
    assert api.get(f"/api/async/status/{task_id}").json()["status"] == "SUCCESS"
