"""Circuit breakers: one for all who call a backend, in Redis."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from uuid import uuid4

import httpx
import pytest
import redis

from app.contracts import Backend
from app.engine.breakers import BreakerOpenError, Breakers, Pass
from tests.integration.harness import Stack, bearer, new_key, paused, problem, wait_until

pytestmark = pytest.mark.integration

Make = Callable[..., Breakers]


@pytest.fixture
def clients(stack: Stack) -> Iterator[Callable[[], redis.Redis]]:
    opened: list[redis.Redis] = []

    def connect() -> redis.Redis:
        url = stack.settings.redis_url.get_secret_value()
        opened.append(redis.Redis.from_url(url, decode_responses=True, socket_timeout=1))
        return opened[-1]

    yield connect
    for client in opened:
        client.close()


@pytest.fixture
def make(clients: Callable[[], redis.Redis]) -> Make:
    """The breakers as one more process sees them."""

    def make(*, failures: int = 3, window: float = 60, seconds: float = 60, lease: float = 60) -> Breakers:
        return Breakers(clients(), failures=failures, window=window, seconds=seconds, lease=lease)

    return make


@pytest.fixture
def name() -> str:
    return uuid4().hex


def fail(breakers: Breakers, name: str, times: int = 1) -> None:
    for leave in [breakers.enter(name) for _ in range(times)]:
        breakers.report(leave, well=False)


def passes(breakers: Breakers, name: str) -> bool:
    try:
        breakers.enter(name)
    except BreakerOpenError:
        return False
    return True


def probe(breakers: Breakers, name: str) -> Pass:
    """Leave for the one call that an open breaker lets through once its time is over."""

    def enter() -> Pass | None:
        try:
            return breakers.enter(name)
        except BreakerOpenError:
            return None

    return wait_until(enter, 10)


def test_it_opens_for_all_when_two_processes_have_seen_enough_failures_together(make: Make, name: str) -> None:
    one, other, third = make(), make(), make()
    fail(one, name, 2)
    assert passes(third, name)
    fail(other, name)
    assert not any(passes(breakers, name) for breakers in (one, other, third))
    assert passes(one, uuid4().hex)


def test_answers_that_are_well_open_nothing_and_forgive_nothing(make: Make, name: str) -> None:
    breakers = make()
    for _ in range(2):
        fail(breakers, name)
        breakers.report(breakers.enter(name), well=True)
    assert passes(breakers, name)
    fail(breakers, name)
    assert not passes(breakers, name)


def test_failures_that_are_long_past_do_not_count(make: Make, name: str) -> None:
    breakers = make(window=0.2)
    fail(breakers, name, 2)
    time.sleep(0.3)
    fail(breakers, name, 2)
    assert passes(breakers, name)


def test_of_twenty_calls_at_once_one_is_the_probe(make: Make, name: str) -> None:
    breakers = [make(seconds=0.2) for _ in range(20)]
    fail(breakers[0], name, 3)
    assert not passes(breakers[0], name)
    time.sleep(0.3)
    together = Barrier(20)

    def enter(one: Breakers) -> bool:
        together.wait(10)
        return passes(one, name)

    with ThreadPoolExecutor(20) as pool:
        assert sum(pool.map(enter, breakers)) == 1


def test_a_probe_that_is_well_closes_it_and_the_count_begins_anew(make: Make, name: str) -> None:
    breakers = make(seconds=0.1)
    fail(breakers, name, 3)
    breakers.report(probe(breakers, name), well=True)
    fail(breakers, name, 2)
    assert passes(breakers, name)


def test_a_probe_that_fails_opens_it_again(make: Make, name: str) -> None:
    quick, slow = make(seconds=0.1), make()
    fail(quick, name, 3)
    slow.report(probe(quick, name), well=False)
    time.sleep(0.2)
    assert not passes(quick, name)


@pytest.mark.parametrize("well", [True, False])
def test_late_answers_of_calls_that_began_before_it_opened_change_nothing(
    make: Make, clients: Callable[[], redis.Redis], name: str, well: bool
) -> None:
    breakers, records = make(), clients()
    late = [breakers.enter(name) for _ in range(5)]
    fail(breakers, name, 3)
    before = records.hgetall(f"breaker:{name}")
    for leave in late:
        breakers.report(leave, well=well)
    assert records.hgetall(f"breaker:{name}") == before
    assert before["state"] == "open"


def test_late_failures_of_calls_that_began_before_it_opened_do_not_open_it_again(make: Make, name: str) -> None:
    breakers = make(seconds=0.1)
    late = [breakers.enter(name) for _ in range(5)]
    fail(breakers, name, 3)
    breakers.report(probe(breakers, name), well=True)
    for leave in late:
        breakers.report(leave, well=False)
    assert passes(breakers, name)


def test_a_probe_that_dies_blocks_only_as_long_as_its_lease_and_its_late_answer_does_not_count(
    make: Make, name: str
) -> None:
    breakers = make(seconds=0.1, lease=0.3)
    fail(breakers, name, 3)
    dead = probe(breakers, name)
    assert not passes(breakers, name)
    following = probe(breakers, name)
    breakers.report(dead, well=True)
    assert not passes(make(), name)
    breakers.report(following, well=True)
    assert passes(breakers, name)


def test_without_redis_calls_pass(stack: Stack, make: Make, name: str) -> None:
    breakers = make()
    fail(breakers, name, 3)
    with paused(stack, "redis"):
        leave = breakers.enter(name)
        breakers.report(leave, well=False)
    wait_until(lambda: not passes(breakers, name))


def test_every_breaker_is_shown_to_admins_alone(
    stack: Stack, api: httpx.Client, make: Make, clients: Callable[[], redis.Redis]
) -> None:
    records = clients()
    problem(api.get("/api/circuit-breakers"), 401, "unauthorized")
    problem(api.get("/api/circuit-breakers", headers=bearer(new_key(stack))), 403, "forbidden")
    fail(make(), Backend.FRAUD, 3)
    try:
        rows = api.get("/api/circuit-breakers", headers=bearer(new_key(stack, "--admin"))).json()["breakers"]
    finally:
        records.delete(f"breaker:{Backend.FRAUD}")
    shown = {row["name"]: row for row in rows}
    assert set(shown) == set(Backend)
    assert (shown["fraud"]["state"], shown["fraud"]["failures"]) == ("open", 3)
    assert shown["fraud"]["opened_at"] < shown["fraud"]["retry_at"]
    assert shown["tax"] == {"name": "tax", "state": "closed", "failures": 0, "opened_at": None, "retry_at": None}
