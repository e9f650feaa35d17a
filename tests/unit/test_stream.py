import asyncio
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

import pytest

from app.api.stream import TaskStream, event
from app.api.waiting import left
from app.engine.live import Live, Update, document
from tests.unit.test_live import Servers, eventually, opened, record, servers  # noqa: F401  a fixture


class Client:
    """One client of a stream: what it is sent, when it reads, when it leaves."""

    def __init__(self, **state: Any) -> None:
        self.scope: Any = {"type": "http", "state": state}
        self.sent = b""
        self.complete = False
        self.started: dict[str, Any] = {}
        self.reads = asyncio.Event()
        self.reads.set()
        self.leaves = asyncio.Event()
        self.incoming = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive(self) -> Any:
        if self.incoming:
            return self.incoming.pop(0)
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.started = message
            return
        assert not self.complete
        if not message.get("body"):
            await self.reads.wait()  # as uvicorn does where its buffer is full
        self.sent += message.get("body", b"")
        self.complete = not message.get("more_body", False)

    def ids(self) -> list[str]:
        return [line.removeprefix("id: ") for line in self.sent.decode().split("\n") if line.startswith("id: ")]


def stream(live: Live, version: int = 1, status: str = "PROGRESS", seen: str = "", timeout: float = 5) -> TaskStream:
    return TaskStream(live, "t", Update(document("t", record(version, status))), seen, send_timeout=timeout)


def test_an_event_is_one_line_of_data():
    update = Update({**document("t", record(3)), "result": "a\nb\r\nc\u2028d"})
    lines = event(update).split(b"\n")
    assert [line[:4] for line in lines] == [b"id: ", b"data", b"", b""]
    assert lines[0] == b"id: 1.3"
    assert lines[1] == b"data: " + update.json()
    assert b"\r" not in event(update)


async def test_a_stream_tells_each_change_and_ends_with_the_task(servers: Servers):  # noqa: F811
    servers.records_now["t"] = record(1)
    async with opened(servers) as live:
        client = Client()
        serving = asyncio.create_task(stream(live)(client.scope, client.receive, client.send))
        await eventually(lambda: servers.reads)
        servers.change("t", record(2))
        await eventually(lambda: client.ids() == ["1.1", "1.2"])
        servers.change("t", record(3, "SUCCESS"))
        await asyncio.wait_for(serving, 5)
        assert client.ids() == ["1.1", "1.2", "1.3-final"]
        assert client.complete
        assert client.sent.startswith(b"retry: ")
        headers = dict(client.started["headers"])
        assert headers[b"content-type"].startswith(b"text/event-stream")
        assert headers[b"cache-control"] == b"no-store"
        assert b"content-length" not in headers
        assert live.watches == 0


async def test_a_resumed_stream_begins_after_what_was_seen(servers: Servers):  # noqa: F811
    servers.records_now["t"] = record(4)
    async with opened(servers) as live:
        client = Client()
        serving = asyncio.create_task(stream(live, 4, seen="1.4")(client.scope, client.receive, client.send))
        await eventually(lambda: servers.reads and client.sent)
        servers.change("t", record(5, "FAILURE"))
        await asyncio.wait_for(serving, 5)
        assert client.ids() == ["1.5-final"]


async def test_a_task_that_has_ended_is_told_once_without_a_subscription(servers: Servers):  # noqa: F811
    async with opened(servers) as live:
        client = Client()
        await asyncio.wait_for(stream(live, 7, "SUCCESS")(client.scope, client.receive, client.send), 5)
        assert (client.ids(), client.complete) == (["1.7-final"], True)


async def test_a_quiet_stream_shows_that_it_lives_and_says_when_redis_does_not(servers: Servers):  # noqa: F811
    servers.records_now["t"] = record(1)
    async with opened(servers, heartbeat=0.05) as live:
        client = Client()
        serving = asyncio.create_task(stream(live)(client.scope, client.receive, client.send))
        await eventually(lambda: client.sent.count(b": waiting\n\n") > 2)
        servers.away = True
        await eventually(lambda: b"cannot be read" in client.sent)
        servers.records_now["t"] = record(2, "SUCCESS")
        servers.away = False
        await asyncio.wait_for(serving, 5)
        assert client.ids() == ["1.1", "1.2-final"]


async def test_a_client_that_leaves_frees_its_place_at_once(servers: Servers):  # noqa: F811
    servers.records_now["t"] = record(1)
    async with opened(servers) as live:
        client = Client()
        serving = asyncio.create_task(stream(live)(client.scope, client.receive, client.send))
        await eventually(lambda: live.watches == 1)
        client.leaves.set()
        await asyncio.wait_for(serving, 5)
        assert live.watches == 0


async def test_a_client_that_does_not_read_is_dropped(servers: Servers):  # noqa: F811
    servers.records_now["t"] = record(1)
    async with opened(servers) as live:
        client = Client()
        client.scope["state"]["abort"] = client.leaves.set
        serving = asyncio.create_task(stream(live, timeout=0.05)(client.scope, client.receive, client.send))
        client.reads.clear()
        await asyncio.wait_for(serving, 5)
        assert client.leaves.is_set()
        assert not client.complete
        assert live.watches == 0


async def test_draining_ends_a_stream_without_a_final_event(servers: Servers):  # noqa: F811
    servers.records_now["t"] = record(1)
    async with opened(servers) as live:
        client = Client()
        serving = asyncio.create_task(stream(live)(client.scope, client.receive, client.send))
        await eventually(client.ids)
        live.drain()
        await asyncio.wait_for(serving, 5)
        assert (client.ids(), client.complete) == (["1.1"], True)
        late = Client()
        await asyncio.wait_for(stream(live, 2, seen="1.2")(late.scope, late.receive, late.send), 5)
        assert late.sent.startswith(b"retry: ")  # so that it comes back, to another replica
        assert late.complete


async def test_head_is_answered_without_waiting_and_a_stream_holds_no_place(servers: Servers):  # noqa: F811
    released: list[int] = []
    async with opened(servers) as live:
        client = Client(head=True, release=lambda: released.append(1))
        await asyncio.wait_for(stream(live)(client.scope, client.receive, client.send), 5)
        assert (client.sent, client.complete, released) == (b"", True, [1])


PROGRAM = """
import asyncio, sys, uvicorn
from contextlib import asynccontextmanager

drained = asyncio.Event()

@asynccontextmanager
async def nothing(app):
    yield

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        scope["state"]["drain"] = drained.set
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/flood":
        # More than any buffer holds, then a client that is not waited for.
        for _ in range(1000):
            try:
                async with asyncio.timeout(0.5):
                    await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
                    await asyncio.sleep(0)
            except TimeoutError:
                scope["state"]["abort"]()
                while (await receive())["type"] != "http.disconnect":
                    pass
                print("dropped", flush=True)
                return
        return
    await send({"type": "http.response.body", "body": b"open", "more_body": True})
    await drained.wait()
    await send({"type": "http.response.body", "body": b"end"})

uvicorn.run(app, fd=int(sys.argv[1]), http="app.api.protocol:OneWriteProtocol", log_level="error",
            timeout_graceful_shutdown=60)
"""


@pytest.fixture
async def server():
    """A uvicorn with our protocol and an application of a few lines: its process and its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, str(listener.fileno()), pass_fds=[listener.fileno()],
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        yield process, listener.getsockname()[1]
    if process.returncode is None:
        process.kill()
    await process.wait()


async def test_sigterm_ends_open_answers_through_the_protocol(server: tuple[asyncio.subprocess.Process, int]):
    process, port = server
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    await asyncio.wait_for(reader.readuntil(b"open\r\n"), 20)
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(reader.read(), 20) == b"3\r\nend\r\n0\r\n\r\n"
    writer.close()
    await writer.wait_closed()
    await asyncio.wait_for(process.wait(), 20)


async def test_flow_control_reaches_the_application_and_a_stuck_client_can_be_dropped(
    server: tuple[asyncio.subprocess.Process, int],
):
    process, port = server
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.transport.pause_reading()
    writer.write(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), 20) == b"dropped\n"
    writer.transport.abort()
    with suppress(OSError):
        await writer.wait_closed()


async def test_left_passes_over_the_body():
    client = Client()
    client.leaves.set()
    await asyncio.wait_for(left(client.receive), 5)
