"""The outside world keeps its word: what is asked for under one key is done once, and not once it was taken back."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pymongo
import pytest

from tests.integration.harness import Stack, paused, wait_until

pytestmark = pytest.mark.integration

ADDRESS = {"street": "Main Street 1", "city": "Berlin", "postcode": "10115", "country": "DE"}
DO = {
    "payment": ("/payment/charge", {"amount": 100, "card": "tok_4242"}),
    "shipping": ("/shipping/book", {"sku": "lamp", "quantity": 1, "address": ADDRESS}),
    "mail": ("/mail/send", {"to": "a@example.org", "subject": "s", "text": "t"}),
}
OTHER = {
    "payment": {"amount": 200, "card": "tok_4242"},
    "shipping": {"sku": "lamp", "quantity": 2, "address": ADDRESS},
    "mail": {"to": "b@example.org", "subject": "s", "text": "t"},
}
UNDO = {"payment": "/payment/refund", "shipping": "/shipping/cancel", "mail": "/mail/recall"}
SHOW = {"payment": "/payment/charges", "shipping": "/shipping/shipments", "mail": "/mail/mails"}


@pytest.fixture
def outside(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.outside, timeout=30) as client:
        yield client


@pytest.fixture
def sku(outside: httpx.Client) -> str:
    """A shelf of its own with ten pieces."""
    name = f"t-{uuid4().hex[:12]}"
    outside.put(f"/inventory/{name}", json={"stock": 10, "price": 250}).raise_for_status()
    return name


def key() -> dict[str, str]:
    return {"Idempotency-Key": uuid4().hex}


def refusal(answer: httpx.Response) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.json()["type"].removeprefix("urn:problem:")


@pytest.mark.parametrize("name", DO)
def test_the_same_key_does_it_once_and_another_body_is_refused(outside: httpx.Client, name: str) -> None:
    path, body = DO[name]
    headers = key()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: outside.post(path, json=body, headers=headers), range(8)))
    assert len({(answer.status_code, answer.content) for answer in answers}) == 1
    assert answers[0].is_success
    assert refusal(outside.post(path, json=OTHER[name], headers=headers)) == (422, "key-reused")
    shown = outside.get(f"{SHOW[name]}/{headers['Idempotency-Key']}").json()
    assert shown["state"] == "done"


@pytest.mark.parametrize("name", DO)
def test_what_was_taken_back_beforehand_is_not_done_afterwards(outside: httpx.Client, name: str) -> None:
    path, body = DO[name]
    headers = key()
    assert [outside.post(UNDO[name], headers=headers).status_code for _ in range(2)] == [200, 200]
    assert refusal(outside.post(path, json=body, headers=headers)) == (409, "conflict")
    shown = outside.get(f"{SHOW[name]}/{headers['Idempotency-Key']}").json()
    assert (shown["state"], shown["details"]) == ("undone", None)


@pytest.mark.parametrize("name", DO)
def test_what_was_done_is_taken_back_for_good(outside: httpx.Client, name: str) -> None:
    path, body = DO[name]
    headers = key()
    outside.post(path, json=body, headers=headers).raise_for_status()
    assert outside.post(UNDO[name], headers=headers).json()["state"] == "undone"
    assert refusal(outside.post(path, json=body, headers=headers)) == (409, "conflict")


@pytest.mark.parametrize("name", DO)
def test_doing_and_undoing_at_once_ends_undone(outside: httpx.Client, name: str) -> None:
    path, body = DO[name]
    for _ in range(5):
        headers = key()
        with ThreadPoolExecutor(4) as pool:
            doing = [pool.submit(outside.post, path, json=body, headers=headers) for _ in range(2)]
            undoing = [pool.submit(outside.post, UNDO[name], headers=headers) for _ in range(2)]
            assert {answer.result().status_code for answer in undoing} == {200}
            assert {answer.result().status_code for answer in doing} <= {200, 204, 409}
        assert outside.get(f"{SHOW[name]}/{headers['Idempotency-Key']}").json()["state"] == "undone"


def shelf(outside: httpx.Client, sku: str) -> tuple[int, int]:
    row = outside.get(f"/inventory/{sku}").json()
    return row["stock"], row["reserved"]


def test_a_new_world_has_lamps_chairs_and_tables(outside: httpx.Client) -> None:
    rows = {row["sku"]: row["price"] for row in outside.get("/inventory").json()}
    assert {"lamp": 2_500, "chair": 8_000, "table": 40_000}.items() <= rows.items()
    assert refusal(outside.get("/inventory/unheard-of")) == (404, "not-found")


def test_no_more_is_reserved_than_there_is(outside: httpx.Client, sku: str) -> None:
    def reserve(_: int) -> int:
        return outside.post(f"/inventory/{sku}/reserve", json={"quantity": 3}, headers=key()).status_code

    with ThreadPoolExecutor(8) as pool:
        assert Counter(pool.map(reserve, range(8))) == {200: 3, 409: 5}
    assert shelf(outside, sku) == (1, 9)


def test_one_key_reserves_ships_and_releases_once(outside: httpx.Client, sku: str) -> None:
    headers = key()

    def post(action: str, quantity: int | None = None) -> httpx.Response:
        body = None if quantity is None else {"quantity": quantity}
        return outside.post(f"/inventory/{sku}/{action}", json=body, headers=headers)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post("reserve", 4), range(8)))
    assert [answer.json() for answer in answers] == [{"sku": sku, "quantity": 4, "amount": 1_000}] * 8
    assert refusal(post("reserve", 5)) == (422, "key-reused")
    assert shelf(outside, sku) == (6, 4)
    assert [post("ship").status_code for _ in range(2)] == [204, 204]
    assert post("reserve", 4).status_code == 200
    assert shelf(outside, sku) == (6, 0)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: post("release").status_code, range(8))) == {204}
    assert shelf(outside, sku) == (10, 0)
    assert refusal(post("ship")) == (409, "conflict")
    assert refusal(post("reserve", 4)) == (409, "conflict")


def test_stock_that_was_released_beforehand_is_not_reserved_afterwards(outside: httpx.Client, sku: str) -> None:
    headers = key()
    assert outside.post(f"/inventory/{sku}/release", headers=headers).status_code == 204
    answer = outside.post(f"/inventory/{sku}/reserve", json={"quantity": 1}, headers=headers)
    assert refusal(answer) == (409, "conflict")
    assert shelf(outside, sku) == (10, 0)


def test_nothing_is_shipped_that_was_not_reserved_and_what_nobody_sells_is_released(
    outside: httpx.Client, sku: str
) -> None:
    assert refusal(outside.post(f"/inventory/{sku}/ship", headers=key())) == (409, "conflict")
    assert refusal(outside.post("/inventory/unheard-of/reserve", json={"quantity": 1}, headers=key()))[0] == 404
    assert outside.post("/inventory/unheard-of/release", headers=key()).status_code == 204


def reservations(state: str, at: datetime) -> list[dict[str, Any]]:
    return [{"key": f"k-{row}", "quantity": 1, "price": 1, "state": state, "at": at} for row in range(10_000)]


def test_a_shelf_keeps_so_many_reservations_and_forgets_those_that_ended_long_ago(
    stack: Stack, outside: httpx.Client, sku: str
) -> None:
    with pymongo.MongoClient(stack.settings.mongodb_url.get_secret_value()) as client:
        shelves, now = client["stack"]["outside_stock"], datetime.now(UTC)
        shelves.update_one({"_id": sku}, {"$set": {"reservations": reservations("reserved", now - timedelta(days=9))}})
        answer = outside.post(f"/inventory/{sku}/reserve", json={"quantity": 1}, headers=key())
        assert refusal(answer) == (503, "unavailable")
        assert refusal(outside.post(f"/inventory/{sku}/release", headers=key())) == (503, "unavailable")
        shelves.update_one({"_id": sku}, {"$set": {"reservations": reservations("shipped", now - timedelta(hours=2))}})
        answer = outside.post(f"/inventory/{sku}/reserve", json={"quantity": 1}, headers=key())
        assert answer.status_code == 200
        assert len(shelves.find_one({"_id": sku})["reservations"]) == 1
        shelves.delete_one({"_id": sku})


def test_without_its_database_it_says_so_and_still_computes(stack: Stack, outside: httpx.Client) -> None:
    with paused(stack, "database"):
        degraded = {"status": "degraded", "services": {"mongodb": "disconnected"}}
        wait_until(lambda: outside.get("/health").json() == degraded)
        path, body = DO["payment"]
        assert refusal(outside.post(path, json=body, headers=key())) == (503, "unavailable")
        assert outside.post("/tax/compute", json={"amount": 100, "country": "DE"}).status_code == 200
    wait_until(lambda: outside.get("/health").json()["status"] == "healthy")
