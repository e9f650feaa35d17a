"""Live updates against the real stack: streams, waits, and what happens to them when a part fails."""

import asyncio
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from uuid import uuid4

import httpx
import psutil
import pymongo
import pytest
import redis
from httpx import URL

from app.context import Context
from app.engine.live import Live
from tests.integration.harness import Stack, finished, problem, submit, wait_until
from tests.integration.test_faults import healed, paused  # noqa: F401  a fixture

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("healed")]


@dataclass
class Event:
    id: str
    data: dict[str, object]

    @property
    def status(self) -> object:
        return self.data["status"]


class Reader:
    """An EventSource: the events of one stream as they come."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.events: list[Event] = []
        self.comments = 0
        self.retry: int | None = None
        self._lines = response.iter_lines()

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        fields: dict[str, str] = {}
        for line in self._lines:
            name, _, value = line.partition(": ")
            if line.startswith(":"):
                self.comments += 1
            elif name == "retry":
                self.retry = int(value)
            elif line:
                fields[name] = value
            elif fields:
                self.events.append(Event(fields["id"], json.loads(fields["data"])))
                return self.events[-1]
        raise StopIteration


@contextmanager
def streaming(url: str, task_id: str, seen: str | None = None) -> Iterator[Reader]:
    headers = {} if seen is None else {"Last-Event-ID": seen}
    timeout = httpx.Timeout(60)
    with httpx.stream("GET", f"{url}/api/async/tasks/{task_id}/stream", headers=headers, timeout=timeout) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        yield Reader(response)


@pytest.fixture
def records(stack: Stack) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(stack.settings.redis_url.get_secret_value(), decode_responses=True) as client:
        yield client


@pytest.fixture
async def live(context: Context) -> AsyncIterator[Live]:
    """Live updates of this process, which look again twice a second."""
    await context.publisher.ping()  # its declarations are made in a thread, which must not be left behind
    async with Live(context.store, context.results, limit=2000, heartbeat=0.5) as opened:
        yield opened


async def steps(context: Context, number: int, seconds: float = 0.05) -> str:
    accepted = await context.tasks.submit(
        "test.steps", {"steps": number, "seconds": seconds}, task_id=str(uuid4()), digest="", request_id="live",
        queue="heavy",
    )  # fmt: skip
    return accepted.task_id


def listeners(records: redis.Redis) -> list[dict[str, str]]:
    """The connections of the API that are in pub/sub mode."""
    return [row for row in records.client_list() if "P" in row["flags"] and row["name"].startswith("api-")]


def version(event: Event) -> tuple[int, ...]:
    return tuple(int(part) for part in event.id.removesuffix("-final").split("."))


@pytest.mark.parametrize("through", ["nginx", "a replica"])
async def test_a_stream_tells_a_task_from_pending_to_its_end(
    stack: Stack, api: httpx.Client, context: Context, through: str
) -> None:
    # Two tasks before it hold the worker's children, so that it is seen waiting.
    for _ in range(2):
        await steps(context, 20)
    task_id = await steps(context, 20)
    url = stack.url if through == "nginx" else stack.replicas[0]
    with streaming(url, task_id) as reader:
        first = next(reader)
        assert first.status == "PENDING"
        # The event is here while the task has not ended: nothing holds it back on its way.
        assert api.get(f"/api/async/status/{task_id}").json()["finished_at"] is None
        list(reader)
    assert reader.retry is not None
    assert 1000 <= reader.retry <= 3000
    versions = [version(event) for event in reader.events]
    assert versions == sorted(set(versions))
    statuses = [event.status for event in reader.events]
    assert statuses == sorted(statuses, key=["PENDING", "STARTED", "PROGRESS", "SUCCESS"].index)
    done = [event.data["progress"]["current"] for event in reader.events if event.status == "PROGRESS"]
    assert len(set(done)) >= 5
    assert done == sorted(done)
    last = reader.events[-1]
    assert last.id.endswith("-final")
    assert [event for event in reader.events if event.id.endswith("-final")] == [last]
    assert last.data == api.get(f"/api/async/status/{task_id}").json()


def test_a_stream_is_resumed_after_what_was_seen_and_ends_for_good(stack: Stack, api: httpx.Client) -> None:
    task_id = submit(api, iterations=4000)
    with streaming(stack.url, task_id) as reader:
        while next(reader).status != "PROGRESS":
            pass
    seen = reader.events[-1]
    with streaming(stack.url, task_id, seen.id) as resumed:
        list(resumed)
    assert all(version(event) > version(seen) for event in resumed.events)
    final = resumed.events[-1]
    assert final.status == "SUCCESS"
    for url in (stack.url, *stack.replicas):
        again = httpx.get(f"{url}/api/async/tasks/{task_id}/stream", headers={"Last-Event-ID": final.id})
        assert (again.status_code, again.content) == (204, b"")
    with streaming(stack.url, task_id, "nonsense") as late:
        assert [event.id for event in late] == [final.id]


def test_the_archive_streams_a_task_whose_record_has_left_redis(
    stack: Stack, api: httpx.Client, records: redis.Redis
) -> None:
    task_id = submit(api)
    document = finished(api, task_id)
    with pymongo.MongoClient(stack.settings.mongodb_url.get_secret_value()) as database:
        wait_until(lambda: database["stack"]["task_results"].find_one({"task_id": task_id}))
    records.delete(f"task:{task_id}")
    with streaming(stack.url, task_id) as reader:
        assert [event.data for event in reader] == [document]
    seen = {"Last-Event-ID": reader.events[-1].id}
    assert api.get(f"/api/async/tasks/{task_id}/stream", headers=seen).status_code == 204


@pytest.mark.parametrize("task_id", ["837a7479-69eb-4ca4-9b10-871b46642a74", "nonsense"])
def test_there_is_no_stream_of_an_unknown_task(api: httpx.Client, task_id: str) -> None:
    problem(api.get(f"/api/async/tasks/{task_id}/stream"), 404, "not-found")
    problem(api.get(f"/api/async/tasks/{task_id}", params={"wait": 5}), 404, "not-found")


def test_head_of_a_stream_does_not_wait_for_the_task(api: httpx.Client) -> None:
    task_id = submit(api, iterations=4000)
    answer = api.head(f"/api/async/tasks/{task_id}/stream")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert api.get(f"/api/async/status/{task_id}").json()["finished_at"] is None
    finished(api, task_id)


async def test_a_cancel_is_told(stack: Stack, api: httpx.Client, context: Context) -> None:
    task_id = await steps(context, 200)
    with streaming(stack.url, task_id) as reader:
        while next(reader).status != "PROGRESS":
            pass
        api.delete(f"/api/async/tasks/{task_id}")
        assert [event.status for event in reader][-1] == "CANCELLED"


async def test_many_watchers_share_one_connection_that_knows_only_what_is_watched(
    stack: Stack, context: Context, records: redis.Redis
) -> None:
    tasks = [await steps(context, 600) for _ in range(3)]
    before = {row["id"] for row in listeners(records)}
    with ExitStack() as open_streams:
        readers = [
            open_streams.enter_context(streaming(stack.replicas[0], task_id)) for task_id in tasks for _ in range(10)
        ]
        for reader in readers:
            next(reader)
        assert len({row["id"] for row in listeners(records)} - before) <= 1
        assert len(listeners(records)) <= 2  # one for each replica
        channels = [f"task:{task_id}" for task_id in tasks]
        # A stream's first event does not wait for the subscription, after which the record is read once more.
        wait_until(lambda: dict(records.pubsub_numsub(*channels)) == dict.fromkeys(channels, 1))
        for task_id in tasks:
            await context.store.cancel(task_id, "heavy")
        for reader in readers:
            assert [event.status for event in reader][-1] == "CANCELLED"
    wait_until(lambda: not any(count for _, count in records.pubsub_numsub(*channels)))


async def test_a_client_that_goes_away_is_forgotten_at_once(
    stack: Stack, context: Context, records: redis.Redis
) -> None:
    task_id = await steps(context, 100, 0.1)
    for url in (stack.url, stack.replicas[0]):
        with streaming(url, task_id) as reader:
            next(reader)
            wait_until(lambda: dict(records.pubsub_numsub(f"task:{task_id}")) == {f"task:{task_id}": 1})
        # The next heartbeat of the stream would be 15 s away.
        wait_until(lambda: dict(records.pubsub_numsub(f"task:{task_id}")) == {f"task:{task_id}": 0}, 5)
    await context.store.cancel(task_id, "heavy")


async def test_a_killed_pubsub_connection_does_not_lose_the_end(
    stack: Stack, context: Context, records: redis.Redis
) -> None:
    task_id = await steps(context, 60)
    with streaming(stack.url, task_id) as reader:
        while next(reader).status != "PROGRESS":
            pass
        assert records.execute_command("CLIENT", "KILL", "TYPE", "pubsub") >= 1
        assert [event.status for event in reader][-1] == "SUCCESS"


async def test_a_change_whose_notice_was_lost_is_told_all_the_same(live: Live, records: redis.Redis) -> None:
    task_id, fields = str(uuid4()), {"name": "x", "queue": "heavy", "request_id": "x", "owner": "", "digest": ""}
    numbers = {"attempts": 1, "created_at": 1, "epoch": 1, "version": 1}
    records.hset(f"task:{task_id}", mapping={**fields, **numbers, "status": "STARTED"})
    try:
        with live.watch(task_id) as watch:
            assert (await watch.next(10)).document["status"] == "STARTED"
            records.hset(f"task:{task_id}", mapping={"status": "SUCCESS", "version": 2})  # and no PUBLISH
            assert (await watch.next(10)).final
    finally:
        records.delete(f"task:{task_id}")


def test_a_stream_outlasts_a_redis_that_hangs(stack: Stack, api: httpx.Client) -> None:
    task_id = submit(api, iterations=3000)
    with streaming(stack.url, task_id) as reader:
        while next(reader).status != "PROGRESS":
            pass
        with paused(stack, "redis"):
            time.sleep(7)  # past the time-out of 5 s, so that reads fail
        assert [event.status for event in reader][-1] == "SUCCESS"


def test_a_stream_outlasts_a_redis_that_is_killed(stack: Stack, api: httpx.Client) -> None:
    task_id = submit(api, iterations=4000)
    with streaming(stack.url, task_id) as reader:
        while next(reader).status != "PROGRESS":
            pass
        time.sleep(1.5)  # the record is on Redis's disk by then
        os.kill(stack.pid("redis"), signal.SIGKILL)
        assert [event.status for event in reader][-1] == "SUCCESS"


@pytest.mark.parametrize("path", ["status", "tasks"])
@pytest.mark.parametrize("asks", ["url", "header"])
async def test_a_status_can_wait_for_the_end(api: httpx.Client, context: Context, path: str, asks: str) -> None:
    task_id = await steps(context, 10)
    params = {"wait": 25} if asks == "url" else {}
    headers = {"Prefer": "wait=25"} if asks == "header" else {}
    answer = api.get(f"/api/async/{path}/{task_id}", params=params, headers=headers)
    assert (answer.status_code, answer.json()["status"]) == (200, "SUCCESS")
    assert "retry-after" not in answer.headers
    assert answer.headers.get("preference-applied") == ("wait=25" if asks == "header" else None)
    assert api.get(f"/api/async/{path}/{task_id}").json() == answer.json()


async def test_a_status_that_waits_in_vain_says_how_it_stands(api: httpx.Client, context: Context) -> None:
    task_id = await steps(context, 100)
    answer = api.get(f"/api/async/status/{task_id}", params={"wait": 1})
    assert answer.json()["status"] in {"STARTED", "PROGRESS"}
    assert int(answer.headers["retry-after"]) >= 1
    await context.store.cancel(task_id, "heavy")


@pytest.mark.parametrize("wait", ["x", "-1", "31", "1.5", ""])
def test_a_malformed_wait_is_refused_and_a_malformed_preference_ignored(api: httpx.Client, wait: str) -> None:
    task_id = submit(api)
    problem(api.get(f"/api/async/status/{task_id}", params={"wait": wait}), 422, "invalid")
    if wait != "31":  # no more than it wants is also well-formed
        answer = api.get(f"/api/async/status/{task_id}", headers={"Prefer": f"wait={wait}"})
        assert answer.status_code == 200
        assert "preference-applied" not in answer.headers


@pytest.mark.parametrize("kind", ["process", "count-words"])
def test_a_submit_can_wait_for_the_result(api: httpx.Client, kind: str) -> None:
    body = {"data": "now", "iterations": 20} if kind == "process" else {"text": "to be or not"}
    answer = api.post(f"/api/async/{kind}", json=body, headers={"Prefer": "respond-async, wait=20"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["preference-applied"] == "wait=20"
    assert "retry-after" not in answer.headers
    document = answer.json()
    assert document["status"] == "SUCCESS"
    assert answer.headers["location"] == f"/api/async/status/{document['task_id']}"
    assert api.get(answer.headers["location"]).json() == document


def test_a_submit_that_waits_in_vain_is_accepted(api: httpx.Client) -> None:
    key = {"Idempotency-Key": uuid4().hex}
    body = {"data": "long", "iterations": 8000}
    answer = api.post("/api/async/process", json=body, headers={"Prefer": "wait=1", **key})
    assert (answer.status_code, answer.headers["preference-applied"]) == (202, "wait=1")
    assert int(answer.headers["retry-after"]) >= 1
    # The same request later gets the result of the one task.
    again = api.post("/api/async/process", json=body, headers={"Prefer": "wait=30", **key})
    assert (again.status_code, again.headers["idempotent-replayed"]) == (200, "true")
    assert (again.json()["task_id"], again.json()["attempts"]) == (answer.json()["task_id"], 1)


def test_a_replica_that_dies_under_a_waiting_submit_leaves_one_task_and_an_answer(
    stack: Stack, api: httpx.Client
) -> None:
    answers: list[httpx.Response] = []
    body = {"data": uuid4().hex, "iterations": 3000}
    waiting = threading.Thread(
        target=lambda: answers.append(api.post("/api/async/process", json=body, headers={"Prefer": "wait=20"}))
    )
    waiting.start()
    served = wait_until(lambda: serving(stack))
    os.kill(stack.pid(served), signal.SIGKILL)
    waiting.join(60)
    (answer,) = answers
    # The other replica knows the task and does not wait once more.
    assert answer.status_code in (200, 202), answer.text
    document = finished(api, answer.json()["task_id"], 60)
    assert (document["status"], document["attempts"]) == ("SUCCESS", 1)


def serving(stack: Stack) -> str | None:
    """The replica to which nginx has an open request; by then its task is published, as a worker has it."""
    with redis.Redis.from_url(stack.settings.redis_url.get_secret_value(), decode_responses=True) as records:
        channels = records.pubsub_channels("task:*")
        running = [channel for channel in channels if records.hget(channel, "status") == "PROGRESS"]
        names = {row["name"] for row in listeners(records) if int(row["sub"]) > 0}
    pids = {name.rsplit("-", 1)[1] for name in names}
    replicas = [f"api-{number}" for number in (1, 2) if str(stack.pid(f"api-{number}")) in pids]
    return replicas[0] if running and replicas else None


def limited(stack: Stack, **environment: str) -> None:
    stack.run("up", "--no-demo", **environment)


def test_who_waits_is_limited_like_all_others(stack: Stack) -> None:
    limited(stack, NGINX_RATE="5", NGINX_BURST="2", NGINX_SUBMIT_RATE="2", NGINX_SUBMIT_BURST="1")
    try:
        with httpx.Client(base_url=stack.url, timeout=60) as client, ThreadPoolExecutor(20) as pool:
            body, headers = {"data": "x", "iterations": 1}, {"Prefer": "wait=5"}
            post = partial(client.post, "/api/async/process", json=body, headers=headers)
            answers = list(pool.map(lambda _: post(), range(20)))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert {answer.status_code for answer in answers} <= {200, 202, 429}
        assert len(refused) >= 10
        assert problem(refused[0], 429, "rate-limited")["instance"] == "/api/async/process"
    finally:
        limited(stack)


def test_watchers_are_bounded(stack: Stack, api: httpx.Client) -> None:
    limited(stack, WATCHERS_MAX="2")
    try:
        task_id = submit(api, iterations=100_000)
        with httpx.Client(base_url=stack.replicas[0], timeout=30) as replica, ExitStack() as open_streams:
            readers = [open_streams.enter_context(streaming(stack.replicas[0], task_id)) for _ in range(2)]
            for reader in readers:
                next(reader)
            refused = replica.get(f"/api/async/tasks/{task_id}/stream")
            problem(refused, 503, "watchers-full")
            assert int(refused.headers["retry-after"]) >= 5
            answer = replica.get(f"/api/async/status/{task_id}", headers={"Prefer": "wait=20"})
            assert answer.json()["finished_at"] is None
            assert "preference-applied" not in answer.headers
            body = {"data": "x", "iterations": 100_000}
            other = replica.post("/api/async/process", json=body, headers={"Prefer": "wait=20"})
            assert other.status_code == 202
            assert "preference-applied" not in other.headers
        with streaming(stack.replicas[0], task_id) as reader:  # the places are free again
            next(reader)
        for started in (task_id, other.json()["task_id"]):
            api.delete(f"/api/async/tasks/{started}")
    finally:
        limited(stack)


async def test_a_reader_that_does_not_read_is_dropped_and_costs_no_memory(
    stack: Stack, api: httpx.Client, context: Context, records: redis.Redis
) -> None:
    limited(stack, STREAM_SEND_TIMEOUT="1")
    try:
        task_id = await steps(context, 10_000, 0.2)
        logged = len(stack.log("api-1"))
        replica = psutil.Process(stack.pid("api-1"))
        with socket.socket() as stuck:
            stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            url = URL(stack.replicas[0])
            stuck.connect((url.host, url.port))
            stuck.sendall(f"GET /api/async/tasks/{task_id}/stream HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            wait_until(lambda: records.pubsub_numsub(f"task:{task_id}")[0][1] == 1)
            before = replica.memory_info().rss
            # Events of 100 KB: the buffers of both kernels are full after some of them.
            payload = json.dumps({"type": "x", "message": "y" * 100_000})

            def dropped() -> bool:
                records.hset(f"task:{task_id}", "error", payload)
                records.hincrby(f"task:{task_id}", "version", 1)
                records.publish(f"task:{task_id}", 1)
                return "too slow" in stack.log("api-1")[logged:]

            wait_until(dropped, 60)
            wait_until(lambda: records.pubsub_numsub(f"task:{task_id}")[0][1] == 0)
            assert replica.memory_info().rss - before < 30_000_000
        api.delete(f"/api/async/tasks/{task_id}")
        assert "Traceback" not in stack.log("api-1")[logged:]
    finally:
        limited(stack)


def test_a_replica_that_is_told_to_stop_ends_its_waits_and_no_end_is_missed(stack: Stack, api: httpx.Client) -> None:
    task_id = submit(api, iterations=6000)
    seen: list[list[Event]] = [[] for _ in range(12)]
    cuts: list[int] = []

    def watch(events: list[Event]) -> None:
        """As EventSource does: come back with the last id until the answer is 204."""
        while not (events and events[-1].id.endswith("-final")):
            with suppress(httpx.TransportError), streaming(stack.url, task_id, events[-1].id if events else None) as r:
                events.extend(r)
            cuts.append(1)
            time.sleep(0.2)

    watchers = [threading.Thread(target=watch, args=[events]) for events in seen]
    answers: list[httpx.Response] = []

    def wait(url: str) -> None:
        answers.append(httpx.get(f"{url}/api/async/status/{task_id}", params={"wait": 30}, timeout=60))

    watchers += [threading.Thread(target=wait, args=[url]) for url in stack.replicas]
    for watcher in watchers:
        watcher.start()
    wait_until(lambda: all(seen))
    replica = psutil.Process(stack.pid("api-1"))
    replica.send_signal(signal.SIGTERM)
    # Within the 20 s that uvicorn waits for what is open, after which it cancels.
    replica.wait(15)
    log = stack.log("api-1")
    assert "graceful shutdown exceeded" not in log
    assert "Application shutdown complete" in log
    for watcher in watchers:
        watcher.join(60)
    assert {events[-1].status for events in seen} == {"SUCCESS"}
    for events in seen:
        versions = [version(event) for event in events]
        assert versions == sorted(set(versions))
    assert len(cuts) > len(seen), "no stream was on the replica that was stopped"
    assert [answer.status_code for answer in answers] == [200, 200]
    assert any(answer.json()["finished_at"] is None for answer in answers)
    assert api.get(f"/api/async/status/{task_id}").json()["attempts"] == 1


@pytest.mark.timeout(300)
async def test_a_thousand_watchers_of_one_replica_all_learn_of_the_end(
    stack: Stack, api: httpx.Client, records: redis.Redis
) -> None:
    task_id = submit(api, iterations=100_000)
    url = URL(stack.replicas[0])
    request = f"GET /api/async/tasks/{task_id}/stream HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    door = asyncio.Semaphore(50)
    opened = 0

    async def watch() -> bytes:
        nonlocal opened
        async with door:
            reader, writer = await asyncio.open_connection(url.host, url.port)
            writer.write(request)
            await reader.readuntil(b"data: ")
            opened += 1
        last = b""
        while line := await reader.readline():
            if line.startswith(b"id: "):
                last = line
        writer.close()
        await writer.wait_closed()
        return last

    async with asyncio.timeout(240):
        watchers = [asyncio.create_task(watch()) for _ in range(1000)]
        while opened < 1000:
            await asyncio.sleep(0.1)
        assert records.pubsub_numsub(f"task:{task_id}")[0][1] == 1
        await asyncio.to_thread(api.delete, f"/api/async/tasks/{task_id}")
        ends = await asyncio.gather(*watchers)
    assert len(set(ends)) == 1
    assert re.fullmatch(rb"id: 1\.\d+-final\r?\n", ends[0])
