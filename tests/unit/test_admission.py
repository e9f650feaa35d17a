import asyncio
from typing import Any

import orjson
import pytest
from starlette.types import Message, Receive, Scope, Send

from app.api.admission import Admission


class Gate:
    """An application whose requests stay in work until they are let go, or fail."""

    def __init__(self) -> None:
        self.entered = 0
        self.scopes: list[Scope] = []
        self.go = asyncio.Event()

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        self.entered += 1
        self.scopes.append(scope)
        await self.go.wait()
        if scope["path"] == "/fails":
            raise RuntimeError("fails")
        for part in (b"one", b"two"):
            await send({"type": "http.response.body", "body": part, "more_body": part == b"one"})


async def ask(app: Any, path: str = "/api/items") -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("a body was read")

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b"", "server": ("t", 80)}
    await app({**scope, "state": {"request_id": "r"}}, receive, send)
    return sent


async def at_work(gate: Gate, app: Any, *paths: str) -> list[asyncio.Task[list[Message]]]:
    tasks = [asyncio.create_task(ask(app, path)) for path in paths]
    while gate.entered < len(paths):
        await asyncio.sleep(0)
    return tasks


async def places(gate: Gate, app: Any) -> int:
    """How many requests are taken at once."""
    gate.go.clear()
    tasks = [asyncio.create_task(ask(app)) for _ in range(5)]
    await asyncio.sleep(0.01)
    gate.go.set()
    return sum(not refused(sent) for sent in await asyncio.gather(*tasks))


def refused(sent: list[Message]) -> bool:
    if sent[0]["type"] != "http.response.start" or sent[0]["status"] != 503:
        return False
    headers = dict(sent[0]["headers"])
    assert orjson.loads(sent[1]["body"])["type"] == "urn:problem:overloaded"
    assert headers[b"content-type"] == b"application/problem+json"
    return int(headers[b"retry-after"]) >= 1


async def test_past_the_limit_503_at_once_and_below_it_again_served():
    gate = Gate()
    app = Admission(gate, 2)
    tasks = await at_work(gate, app, "/a", "/b")
    assert refused(await ask(app))
    assert gate.entered == 2
    gate.go.set()
    await asyncio.gather(*tasks)
    assert not refused(await ask(app))


async def test_the_times_to_come_back_differ():
    app = Admission(Gate(), 0)
    told = {dict((await ask(app))[0]["headers"])[b"retry-after"] for _ in range(100)}
    assert len(told) > 1


async def test_a_request_that_fails_or_is_cancelled_leaves_its_place():
    gate = Gate()
    app = Admission(gate, 2)
    failing, cancelled = await at_work(gate, app, "/fails", "/b")
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    gate.go.set()
    with pytest.raises(RuntimeError):
        await failing
    assert await places(gate, app) == 2


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
async def test_probes_pass_however_much_there_is_to_do(path: str):
    gate = Gate()
    gate.go.set()
    app = Admission(gate, 0)
    assert not refused(await ask(app, path))
    assert refused(await ask(app, "/healthy"))


async def test_who_only_waits_gives_its_place_back_once():
    gate = Gate()
    app = Admission(gate, 1)
    tasks = await at_work(gate, app, "/waits")
    assert refused(await ask(app))
    release = gate.scopes[0]["state"]["release"]
    release()
    release()
    tasks.append(asyncio.create_task(ask(app, "/works")))
    while gate.entered < 2:
        await asyncio.sleep(0)
    assert refused(await ask(app))
    gate.go.set()
    await asyncio.gather(*tasks)
    assert await places(gate, app) == 1


async def test_an_answer_passes_part_by_part():
    gate = Gate()
    gate.go.set()
    assert [part["body"] for part in await ask(Admission(gate, 1))] == [b"one", b"two"]


async def test_what_is_no_request_passes():
    seen: list[Scope] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(scope)

    await Admission(app, 0)({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert seen == [{"type": "lifespan"}]
