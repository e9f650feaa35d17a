import asyncio
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, Self

import pytest
from starlette.requests import Request
from starlette.responses import Response

from app import problems
from app.api import health
from app.api.waiting import Waiting, preferred_wait
from app.engine.live import Update, document
from app.models import Health
from tests.unit.test_live import record


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        (["wait=10"], 10),
        (["WAIT = 10"], 10),
        (['wait="7"'], 7),
        (["respond-async, wait=5"], 5),
        (["respond-async", "wait=5"], 5),
        (["wait=5; urgent"], 5),
        (["wait=5, wait=9"], 5),
        (["wait=900"], 30),
        (["wait=0"], 0),
        (['note="a, wait=9", wait=4'], 4),
        (['note="a \\" , wait=9"'], None),
        ([], None),
        ([""], None),
        (["wait"], None),
        (["wait="], None),
        (["wait=-1"], None),
        (["wait=1.5"], None),
        (["wait=٣"], None),
        (["wait=x, wait=9"], None),
        (["waiting=9"], None),
        (["await=9"], None),
        (["wait=99999999999999999999"], None),
        (['"' * 5000], None),
    ],
)
def test_the_preferred_wait(fields: list[str], seconds: int | None):
    assert preferred_wait(fields) == seconds


class Told:
    """A `Live` whose watches are told what the test says."""

    def __init__(self, *told: Any, full: bool = False, draining: bool = False) -> None:
        self.told = list(told)
        self.full = full
        self.draining = draining
        self.closed = asyncio.Event()
        self.left = False
        self.asked: list[float] = []

    def watch(self, _task_id: str) -> "Told":
        if self.full:
            raise problems.WatchersFull
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.left = True

    def close(self) -> None:
        self.closed.set()

    async def next(self, seconds: float) -> Update | None:
        self.asked.append(seconds)
        if not self.told:
            await asyncio.wait_for(self.closed.wait(), 5)
            return None
        return self.told.pop(0)


def update(version: int, status: str = "PROGRESS") -> Update:
    return Update(document("t", record(version, status)))


def waiting(live: Told, *messages: str, **state: Any) -> tuple[Waiting, Response]:
    incoming = list(messages)

    async def receive() -> dict[str, Any]:
        if not incoming:
            await asyncio.Event().wait()
        return {"type": incoming.pop(0), "body": b"", "more_body": False}

    scope = {"type": "http", "headers": [(b"prefer", b"wait=20")], "state": state}
    response = Response()
    return Waiting(Request(scope, receive), response, live), response


async def test_a_wait_ends_with_the_task():
    live = Told(update(1), update(2, "SUCCESS"), update(3))
    wait, response = waiting(live, "http.request")
    assert (await wait("t")).id == "1.2-final"
    assert response.headers["preference-applied"] == "wait=20"
    assert 19 < live.asked[0] <= 20
    assert live.left


async def test_a_wait_ends_in_time_with_the_latest():
    wait, response = waiting(Told(update(1), None))
    assert (await wait("t")).id == "1.1"
    assert response.headers["preference-applied"] == "wait=20"


async def test_the_urls_wait_wins_and_nothing_is_said_of_the_preference():
    live = Told(None)
    wait, response = waiting(live)
    assert await wait("t", 3) is None
    assert 2 < live.asked[0] <= 3
    assert "preference-applied" not in response.headers


async def test_a_client_that_goes_away_ends_its_wait():
    live = Told()
    wait, _ = waiting(live, "http.request", "http.disconnect")
    assert await asyncio.wait_for(wait("t"), 5) is None
    assert live.left


@pytest.mark.parametrize("live", [{"full": True}, {"draining": True}])
async def test_where_none_may_wait_the_answer_comes_at_once(live: dict[str, bool]):
    wait, response = waiting(Told(update(1), **live), release=lambda: pytest.fail("does not wait"))
    assert await wait("t") is None
    assert "preference-applied" not in response.headers


async def test_who_waits_holds_no_place_among_the_requests():
    released: list[str] = []
    wait, _ = waiting(Told(None), release=lambda: released.append("released"))
    await wait("t", 0)
    assert released == []
    await wait("t")
    assert released == ["released"]


async def test_waiting_is_counted_from_the_arrival():
    live = Told(None)
    wait, _ = waiting(live)
    await asyncio.sleep(0.2)
    await wait("t", 1)
    assert live.asked[0] <= 0.8


def test_a_draining_replica_is_not_ready_but_healthy():
    async def ask(path: str) -> tuple[str, int]:
        async def check() -> Health:
            return Health(status="healthy", timestamp=datetime.now(UTC), services={})

        app = SimpleNamespace(state=SimpleNamespace(health=check))
        scope = {"type": "http", "app": app, "path": path, "headers": [], "server": ("x", 80), "scheme": "http"}
        response = Response()
        answer = await health.health(Request(scope), response, Told(draining=True))
        return answer.status, response.status_code

    assert asyncio.run(ask("/health/ready")) == ("draining", 503)
    assert asyncio.run(ask("/health")) == ("healthy", 200)
