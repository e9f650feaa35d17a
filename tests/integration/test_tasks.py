import hashlib
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import httpx
import pymongo
import pytest
import redis

from app.context import Context
from app.tasks.heavy import derive
from tests.integration.harness import Stack, finished, problem, start, submit, wait_until

pytestmark = pytest.mark.integration


def test_a_heavy_task_runs_and_its_result_can_be_checked(api: httpx.Client) -> None:
    answer = api.post("/api/async/process", json={"data": "hello", "iterations": 150})
    assert answer.status_code == 202
    accepted = answer.json()
    task_id = accepted["task_id"]
    assert accepted["status"] == "PENDING"
    assert accepted["status_url"] == answer.headers["location"] == f"/api/async/status/{task_id}"
    assert int(answer.headers["retry-after"]) >= 1
    document = finished(api, task_id)
    items = [derive(b"hello", index) for index in range(150)]
    assert document["result"] == {
        "processed_items": [item.hex() for item in items[:100]],
        "total_processed": 150,
        "checksum": hashlib.sha256(b"".join(items)).hexdigest(),
    }
    assert document["status"] == "SUCCESS"
    assert document["progress"] == {"current": 150, "total": 150, "progress": 100.0}
    assert (document["error"], document["attempts"], document["queue"]) == (None, 1, "heavy")
    assert document["created_at"] <= document["started_at"] <= document["finished_at"]
    assert api.get(f"/api/async/tasks/{task_id}").json() == document


def test_progress_is_seen_while_it_runs(api: httpx.Client) -> None:
    task_id = submit(api, iterations=4000)
    seen = set()

    def done() -> bool:
        answer = api.get(f"/api/async/status/{task_id}")
        document = answer.json()
        if document["status"] == "PROGRESS":
            seen.add(document["progress"]["current"])
            assert 1 <= int(answer.headers["retry-after"]) <= 2
        return document["status"] == "SUCCESS"

    wait_until(done)
    assert len(seen) >= 3
    assert "retry-after" not in api.get(f"/api/async/status/{task_id}").headers


def test_a_light_task_runs(api: httpx.Client) -> None:
    answer = api.post("/api/async/count-words", json={"text": "to be or\nnot to be"})
    document = finished(api, answer.json()["task_id"])
    assert document["result"] == {"words": 6, "lines": 2, "characters": 18}
    assert document["queue"] == "light"


@pytest.mark.parametrize(("priority", "queue"), [("low", "heavy.low"), ("normal", "heavy"), ("high", "heavy.high")])
def test_each_priority_has_a_queue(api: httpx.Client, priority: str, queue: str) -> None:
    document = finished(api, submit(api, priority=priority))
    assert (document["queue"], document["status"]) == (queue, "SUCCESS")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"data": 1},
        {"data": "x", "iterations": 0},
        {"data": "x", "iterations": 100_001},
        {"data": "x", "priority": "urgent"},
        {"data": "é" * 40_000},
        {"data": "x", "iteration": 5},
    ],
)
def test_what_does_not_fit_is_refused(api: httpx.Client, body: dict[str, object]) -> None:
    problem(api.post("/api/async/process", json=body), 422, "invalid")


@pytest.mark.parametrize("task_id", ["837a7479-69eb-4ca4-9b10-871b46642a74", "nonsense", "x" * 300])
def test_no_such_task(api: httpx.Client, task_id: str) -> None:
    # In the first seconds of a Redis nobody knows whether it has lost something.
    wait_until(lambda: api.get(f"/api/async/status/{task_id}").status_code != 503)
    problem(api.get(f"/api/async/status/{task_id}"), 404, "not-found")
    problem(api.delete(f"/api/async/tasks/{task_id}"), 404, "not-found")


def test_the_request_id_follows_the_task(api: httpx.Client, stack: Stack) -> None:
    mine = uuid4().hex
    answer = api.post("/api/async/process", json={"data": "x", "iterations": 1}, headers={"X-Request-ID": mine})
    assert finished(api, answer.json()["task_id"])["request_id"] == mine
    wait_until(lambda: mine in stack.log("heavy-1"))
    assert mine in stack.log("nginx")
    assert mine in stack.log("api-1") + stack.log("api-2")


def test_fifty_requests_with_one_key_make_one_task(api: httpx.Client) -> None:
    headers = {"Idempotency-Key": f'"{uuid4().hex}"'}
    body = {"data": "once", "iterations": 5}
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: api.post("/api/async/process", json=body, headers=headers), range(50)))
    assert {answer.status_code for answer in answers} == {202}
    (task_id,) = {answer.json()["task_id"] for answer in answers}
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    assert finished(api, task_id)["attempts"] == 1
    problem(api.post("/api/async/process", json=body | {"data": "other"}, headers=headers), 422, "key-reused")
    problem(api.post("/api/async/process", json=body, headers={"Idempotency-Key": "short"}), 422, "invalid")


def test_a_submit_that_nginx_tries_twice_makes_one_task(stack: Stack) -> None:
    edge = {"X-Edge-Request-Id": uuid4().hex}
    body = {"data": "edge", "iterations": 5}
    answers = [httpx.post(f"{replica}/api/async/process", json=body, headers=edge) for replica in stack.replicas]
    assert len({answer.json()["task_id"] for answer in answers}) == 1
    assert all("idempotent-replayed" not in answer.headers for answer in answers)


async def test_a_waiting_task_is_cancelled_at_once(api: httpx.Client, context: Context) -> None:
    running = [await start(context, "test.steps", "heavy", {"steps": 100}) for _ in range(4)]
    waiting = submit(api)
    answer = api.delete(f"/api/async/tasks/{waiting}")
    assert (answer.status_code, answer.json()["status"]) == (202, "CANCELLED")
    assert api.delete(f"/api/async/tasks/{waiting}").json()["status"] == "CANCELLED"
    for task_id in running:
        assert api.delete(f"/api/async/tasks/{task_id}").json()["status"] in ("CANCELLING", "CANCELLED")
    for task_id in running:
        assert finished(api, task_id)["status"] == "CANCELLED"
    document = finished(api, waiting)
    assert (document["status"], document["attempts"], document["result"]) == ("CANCELLED", 0, None)
    assert document["error"]["type"] == "cancelled"


async def test_a_running_task_stops_at_its_next_progress(api: httpx.Client, context: Context) -> None:
    task_id = await start(context, "test.steps", "heavy", {"steps": 200})
    wait_until(lambda: api.get(f"/api/async/status/{task_id}").json()["status"] == "PROGRESS")
    answer = api.delete(f"/api/async/tasks/{task_id}")
    assert (answer.status_code, answer.json()["status"]) == (202, "CANCELLING")
    document = finished(api, task_id)
    assert document["status"] == "CANCELLED"
    assert document["error"] == {"type": "cancelled", "message": "Cancelled while it ran."}
    assert document["progress"]["current"] < 200


def test_a_finished_task_cannot_be_cancelled(api: httpx.Client) -> None:
    task_id = submit(api)
    finished(api, task_id)
    problem(api.delete(f"/api/async/tasks/{task_id}"), 409, "conflict")


async def test_a_failing_task_is_retried_after_a_delay(api: httpx.Client, context: Context) -> None:
    task_id = await start(context, "test.flaky", "light", {"failures": 2})
    seen = set()

    def done() -> bool:
        document = api.get(f"/api/async/status/{task_id}").json()
        seen.add(document["status"])
        return document["status"] == "SUCCESS"

    wait_until(done)
    assert "RETRY" in seen
    document = finished(api, task_id)
    assert (document["attempts"], document["error"], document["result"]) == (3, None, {"retries": 2})


async def test_exhausted_retries_end_in_failure(api: httpx.Client, context: Context) -> None:
    task_id = await start(context, "test.exhausted", "light", {"failures": 9})
    document = finished(api, task_id)
    assert (document["status"], document["attempts"]) == ("FAILURE", 2)
    assert document["error"] == {"type": "OSError", "message": "attempt 2 of 9 fails"}


@pytest.mark.parametrize(
    ("name", "payload", "error"),
    [
        ("test.hopeless", {"failures": 1}, {"type": "hopeless", "message": "nothing helps test.hopeless 1"}),
        ("test.hopeless", {"failures": "x"}, None),
        ("test.large", {"size": 300_000}, {"type": "result_too_large", "message": None}),
        *(("test.unsayable", {"size": number}, {"type": "result_not_json", "message": None}) for number in range(3)),
    ],
)
async def test_some_failures_are_not_retried(
    api: httpx.Client, context: Context, name: str, payload: dict[str, object], error: dict[str, str] | None
) -> None:
    document = finished(api, await start(context, name, "light", payload))
    assert (document["status"], document["attempts"], document["result"]) == ("FAILURE", 1, None)
    if error is None:
        assert document["error"]["type"] == "ValidationError"
    else:
        assert document["error"]["type"] == error["type"]
        assert error["message"] in (None, document["error"]["message"])


async def test_a_task_that_no_worker_knows_fails(api: httpx.Client, context: Context, stack: Stack) -> None:
    worker = stack.pid("light-1")
    document = finished(api, await start(context, "test.unknown", "light", {}))
    assert (document["status"], document["error"]["type"]) == ("FAILURE", "unknown_task")
    assert stack.pid("light-1") == worker


@pytest.mark.parametrize("stubborn", [False, True])
async def test_a_task_that_runs_too_long_is_ended(api: httpx.Client, context: Context, stubborn: bool) -> None:
    document = finished(api, await start(context, "test.endless", "light", {"stubborn": stubborn}))
    assert (document["status"], document["attempts"]) == ("FAILURE", 1)
    assert document["error"]["type"] == "time_limit_exceeded"


async def test_a_finished_task_is_archived_and_may_then_expire(
    api: httpx.Client, context: Context, records: redis.Redis, archive: pymongo.collection.Collection
) -> None:
    task_id = await start(context, "test.odd", "light", {"size": 1})
    document = finished(api, task_id)
    assert document["result"] == {"$big": 2**70 + 1, "name": "test.odd"}
    row = wait_until(lambda: archive.find_one({"task_id": task_id}))
    assert row["_id"] == f"{document['created_at']}-{task_id}"
    assert row["status"] == "SUCCESS"
    assert 0 < wait_until(lambda: records.ttl(f"task:{task_id}") > 0 and records.ttl(f"task:{task_id}")) <= 86_400
    wait_until(lambda: records.xlen("tasks:finished") == 0)
    assert 0 < records.ttl(f"celery-task-meta-{task_id}") <= 3600
    records.delete(f"task:{task_id}")
    assert api.get(f"/api/async/status/{task_id}").json() == document
    problem(api.delete(f"/api/async/tasks/{task_id}"), 409, "conflict")


def test_an_unfinished_record_does_not_expire(api: httpx.Client, records: redis.Redis) -> None:
    task_id = submit(api, iterations=3000)
    assert records.ttl(f"task:{task_id}") == -1
    finished(api, task_id)


def test_queues_are_what_they_are_meant_to_be(stack: Stack) -> None:
    queues = {queue["name"]: queue for queue in management(stack, "queues")}
    for name in ("heavy.high", "heavy", "heavy.low", "light"):
        queue = queues[name]
        assert queue["type"] == "quorum"
        assert queue["durable"]
        assert queue["consumers"] >= 1
        assert queue["arguments"] == {
            "x-queue-type": "quorum",
            "x-delivery-limit": 5,
            "x-max-length": 20_000,
            "x-overflow": "reject-publish",
            "x-dead-letter-exchange": "dead",
            "x-dead-letter-strategy": "at-least-once",
        }
    assert queues["dead"]["type"] == "quorum"
    assert sum(name.startswith("celery_delayed_") for name in queues) == 28


def management(stack: Stack, path: str) -> list[dict[str, object]]:
    return httpx.get(f"{stack.management}/api/{path}", auth=("guest", "guest")).raise_for_status().json()
