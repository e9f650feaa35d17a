"""Orders and fulfilments over real HTTP: they succeed, are refused, meet a world that fails, and lose their workers."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import httpx
import pymongo
import pytest

from app.contracts import Backend
from tests.integration.harness import Stack, bearer, new_key, paused, problem, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

ADDRESS = {"street": "Main Street 1", "city": "Berlin", "postcode": "10115", "country": "DE"}
PRICE = 250  # cents
SHIPPING = 690  # of two pieces within the country
ENDED = {"SUCCESS", "FAILURE", "CANCELLED"}
ALL_DONE = {"shipping/:shipping": "done", "payment/:payment": "done", "mail/:mail": "done"}


class World:
    """The outside world as a test sees it, with a shelf of its own that holds ten pieces."""

    def __init__(self, client: httpx.Client, effects: Any) -> None:
        self._client = client
        self._effects = effects
        self.sku = self.new_sku()

    def new_sku(self) -> str:
        name = f"t-{uuid4().hex[:12]}"
        self._client.put(f"/inventory/{name}", json={"stock": 10, "price": PRICE}).raise_for_status()
        return name

    def conduct(self, name: str, **fields: Any) -> None:
        self._client.put(f"/conduct/{name}", json=fields).raise_for_status()

    def calls(self, name: str) -> int:
        """The requests that have come to a service since it was told how to behave."""
        return self._client.get("/conduct").json()[name]["calls"]

    def shelf(self) -> tuple[int, int]:
        """What is left, and what is reserved."""
        row = self._client.get(f"/inventory/{self.sku}").json()
        return row["stock"], row["reserved"]

    def effects(self, workflow_id: str) -> dict[str, str]:
        """What a workflow has left: service and key, without the workflow's id, and whether it is done or undone."""
        found = self._effects.find({"key": {"$regex": f"^{workflow_id}"}})
        return {row["_id"].replace(workflow_id, ""): row["state"] for row in found}

    def charge(self, workflow_id: str) -> dict[str, Any]:
        return self._client.get(f"/payment/charges/{workflow_id}:payment").json()["details"]


@pytest.fixture
def world(stack: Stack) -> Iterator[World]:
    """Well when the test begins, and again when it ends."""
    url = stack.settings.mongodb_url.get_secret_value()
    with httpx.Client(base_url=stack.outside, timeout=30) as client, pymongo.MongoClient(url) as database:
        yield World(client, database["stack"]["outside_effects"])
        for name in Backend:
            client.put(f"/conduct/{name}", json={}).raise_for_status()


def order(api: httpx.Client, sku: str, **fields: Any) -> str:
    body = {"sku": sku, "quantity": 2, "card": "tok_4242", "email": "a@example.org", "address": ADDRESS, **fields}
    return started(api, "orders", body)


def fulfilment(api: httpx.Client, sku: str, **fields: Any) -> str:
    return started(api, "fulfilment", {"sku": sku, "quantity": 2, "amount": 6_000, "address": ADDRESS, **fields})


def started(api: httpx.Client, kind: str, body: dict[str, Any]) -> str:
    answer = api.post(f"/api/workflows/{kind}", json=body)
    assert answer.status_code == 202, answer.text
    return answer.json()["workflow_id"]


def ended(api: httpx.Client, workflow_id: str, seconds: float = 90) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        document = api.get(f"/api/workflows/{workflow_id}").raise_for_status().json()
        return document if document["status"] in ENDED else None

    return wait_until(look, seconds)


def states(document: dict[str, Any]) -> dict[str, str]:
    return {name: member["status"] for name, member in document["members"].items()}


def told(document: dict[str, Any]) -> dict[str, Any]:
    """What two runs of the same request must say alike."""
    result = document["result"] and {
        name: value for name, value in document["result"].items() if name not in {"charge", "shipment", "sku"}
    }
    compensated = {name: undo["status"] for name, undo in document["compensations"].items()}
    return {
        "status": document["status"], "members": states(document), "compensations": compensated,
        "error": document["error"], "result": result,
    }  # fmt: skip


def test_an_order_reserves_ships_charges_and_tells_once(api: httpx.Client, world: World) -> None:
    workflow_id = order(api, world.sku)
    document = ended(api, workflow_id)
    assert document["status"] == "SUCCESS", document["error"]
    assert states(document) == dict.fromkeys(("inventory", "shipping", "payment", "confirmation"), "SUCCESS")
    assert document["result"]["amount"] == 2 * PRICE + SHIPPING
    assert world.effects(workflow_id) == ALL_DONE
    assert world.charge(workflow_id) == {"amount": 2 * PRICE + SHIPPING, "card": "tok_4242"}
    assert world.shelf() == (8, 0)


def test_an_order_of_more_than_there_is_fails_with_the_reason_and_leaves_nothing(
    api: httpx.Client, world: World
) -> None:
    workflow_id = order(api, world.sku, quantity=11)
    document = ended(api, workflow_id)
    assert document["status"] == "FAILURE"
    assert (document["error"]["type"], document["error"]["member"]) == ("out_of_stock", "inventory")
    assert "11" in document["error"]["message"]
    assert states(document) == {
        "inventory": "FAILURE", "shipping": "SKIPPED", "payment": "SKIPPED", "confirmation": "SKIPPED",
    }  # fmt: skip
    assert world.effects(workflow_id) == {}
    assert world.shelf() == (10, 0)


def test_a_refused_payment_cancels_the_shipment_and_puts_the_goods_back(api: httpx.Client, world: World) -> None:
    workflow_id = order(api, world.sku, card="tok_4000")
    document = ended(api, workflow_id)
    assert document["status"] == "FAILURE"
    assert (document["error"]["type"], document["error"]["member"]) == ("payment_refused", "payment")
    assert {name: undo["status"] for name, undo in document["compensations"].items()} == {
        "inventory": "SUCCESS", "shipping": "SUCCESS", "payment": "SUCCESS",
    }  # fmt: skip
    assert world.effects(workflow_id) == {"shipping/:shipping": "undone", "payment/:payment": "undone"}
    assert world.shelf() == (10, 0)


def test_an_order_to_where_nobody_ships_is_refused(api: httpx.Client, world: World) -> None:
    document = ended(api, order(api, world.sku, address={**ADDRESS, "country": "AQ"}))
    assert (document["status"], document["error"]["type"]) == ("FAILURE", "unknown_address")
    assert world.shelf() == (10, 0)


def test_an_order_that_cannot_be_read_is_refused_at_once(api: httpx.Client) -> None:
    body = {"sku": "lamp", "quantity": 0, "card": "4242424242424242", "email": "nobody", "address": ADDRESS}
    document = problem(api.post("/api/workflows/orders", json=body), 422, "invalid")
    assert {error["loc"][-1] for error in document["errors"]} == {"quantity", "card", "email"}


@pytest.mark.parametrize("name", ["inventory", "shipping", "payment", "mail"])
def test_a_service_that_is_broken_for_a_while_is_asked_again_until_it_is_well(
    api: httpx.Client, world: World, name: str
) -> None:
    world.conduct(name, mode="broken")
    workflow_id = order(api, world.sku)
    wait_until(lambda: world.calls(name) >= 2)
    world.conduct(name, mode="normal")
    document = ended(api, workflow_id)
    assert document["status"] == "SUCCESS", document["error"]
    assert world.effects(workflow_id) == ALL_DONE
    assert world.shelf() == (8, 0)


def test_a_service_that_refuses_everything_fails_the_order(api: httpx.Client, world: World) -> None:
    world.conduct("mail", mode="refusing")
    workflow_id = order(api, world.sku)
    document = ended(api, workflow_id)
    assert (document["error"]["type"], document["error"]["member"]) == ("refused", "confirmation")
    assert world.effects(workflow_id) == dict.fromkeys(ALL_DONE, "undone")
    assert world.shelf() == (10, 0)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_answer_past_the_time_out_charges_nothing_twice(api: httpx.Client, world: World, when: str) -> None:
    world.conduct("payment", mode="slow", seconds=2, when=when)
    workflow_id = order(api, world.sku)
    wait_until(lambda: world.calls("payment") >= 2)
    world.conduct("payment", mode="normal")
    document = ended(api, workflow_id)
    assert document["status"] == "SUCCESS", document["error"]
    assert document["members"]["payment"]["attempts"] >= 2
    assert world.effects(workflow_id) == ALL_DONE


def test_a_charge_that_arrives_after_its_refund_takes_no_money(stack: Stack, api: httpx.Client, world: World) -> None:
    world.conduct("payment", mode="slow", seconds=8, when="before")
    workflow_id = order(api, world.sku)
    wait_until(lambda: world.calls("payment") >= 1)
    api.delete(f"/api/workflows/{workflow_id}").raise_for_status()
    world.conduct("payment", mode="normal")
    assert ended(api, workflow_id)["status"] == "CANCELLED"
    assert world.effects(workflow_id)["payment/:payment"] == "undone"
    refused = '"path": "/payment/charge", "status": 409'
    wait_until(lambda: refused in stack.log("outside"))
    assert world.effects(workflow_id)["payment/:payment"] == "undone"
    assert world.shelf() == (10, 0)


def test_a_fulfilment_uses_all_that_was_found_and_gives_the_goods_away(api: httpx.Client, world: World) -> None:
    document = ended(api, fulfilment(api, world.sku))
    assert document["status"] == "SUCCESS", document["error"]
    assert document["result"] == {
        "sku": world.sku, "quantity": 2, "amount": 6_000, "tax": 1_140, "score": 0, "total": 7_140, "address": ADDRESS,
    }  # fmt: skip
    assert world.shelf() == (8, 0)


REFUSED = {
    "unknown_address": ("address", {"address": {**ADDRESS, "country": "AQ"}}),
    "out_of_stock": ("stock", {"quantity": 11}),
    "fraud_suspected": ("finalize", {"amount": 900_000}),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_fulfilment_with_one_refusal_puts_the_goods_back(api: httpx.Client, world: World, kind: str) -> None:
    member, fields = REFUSED[kind]
    document = ended(api, fulfilment(api, world.sku, **fields))
    assert document["status"] == "FAILURE"
    assert (document["error"]["type"], document["error"]["member"]) == (kind, member)
    assert document["uncompensated"] == []
    assert world.shelf() == (10, 0)


@contextmanager
def held(world: World, name: str, when: str) -> Iterator[None]:
    """A service that keeps its callers waiting, until what is inside is done and one has come."""
    world.conduct(name, mode="slow", seconds=3, when=when)
    yield
    wait_until(lambda: world.calls(name) >= 1)


def kill_workers(stack: Stack, world: World, name: str) -> None:
    """End the light worker with all its processes, as a machine that loses its power does, and hold nobody any more."""
    for process in stack.processes("light-1"):
        process.send_signal(signal.SIGKILL)
    world.conduct(name, mode="normal")


def undisturbed(api: httpx.Client, world: World, begin: Callable[..., str], **fields: Any) -> dict[str, Any]:
    return told(ended(api, begin(api, world.new_sku(), **fields)))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["inventory", "shipping", "payment", "mail"])
def test_an_order_whose_worker_is_killed_ends_like_an_undisturbed_one(
    stack: Stack, api: httpx.Client, world: World, name: str, when: str
) -> None:
    expected = undisturbed(api, world, order)
    with held(world, name, when):
        workflow_id = order(api, world.sku)
    kill_workers(stack, world, name)
    document = ended(api, workflow_id)
    assert told(document) == expected
    assert world.effects(workflow_id) == ALL_DONE
    assert world.shelf() == (8, 0)
    assert max(member["attempts"] for member in document["members"].values()) >= 2


@pytest.mark.parametrize("name", ["payment", "shipping", "inventory"])
def test_an_order_whose_worker_is_killed_while_it_is_undone_ends_like_an_undisturbed_one(
    stack: Stack, api: httpx.Client, world: World, name: str
) -> None:
    """What is held is the last call but those of the undos: one that comes once payment was asked for."""
    expected = undisturbed(api, world, order, card="tok_4000")
    world.conduct("shipping", mode="slow", seconds=0.7)
    workflow_id = order(api, world.sku, card="tok_4000")
    wait_until(lambda: world.calls("shipping") >= 1)
    with held(world, name, "after"):
        pass
    kill_workers(stack, world, name)
    assert told(ended(api, workflow_id)) == expected
    assert world.effects(workflow_id) == {"shipping/:shipping": "undone", "payment/:payment": "undone"}
    assert world.shelf() == (10, 0)


@pytest.mark.parametrize("name", ["inventory", "tax", "address", "fraud"])
def test_a_fulfilment_whose_worker_is_killed_ends_like_an_undisturbed_one(
    stack: Stack, api: httpx.Client, world: World, name: str
) -> None:
    expected = undisturbed(api, world, fulfilment)
    with held(world, name, "after"):
        workflow_id = fulfilment(api, world.sku)
    kill_workers(stack, world, name)
    assert told(ended(api, workflow_id)) == expected
    assert world.shelf() == (8, 0)


def test_a_fulfilment_whose_worker_is_killed_as_it_decides_ends_like_an_undisturbed_one(
    stack: Stack, api: httpx.Client, world: World
) -> None:
    expected = undisturbed(api, world, fulfilment)
    world.conduct("fraud", mode="slow", seconds=0.8)
    workflow_id = fulfilment(api, world.sku)
    wait_until(lambda: world.shelf() == (8, 2))
    with held(world, "inventory", "after"):
        pass
    kill_workers(stack, world, "inventory")
    assert told(ended(api, workflow_id)) == expected
    assert world.shelf() == (8, 0)


def test_a_service_that_stays_broken_is_left_alone_and_shown_to_be(
    stack: Stack, api: httpx.Client, world: World
) -> None:
    admin = bearer(new_key(stack, "--admin"))

    def state() -> str:
        rows = api.get("/api/circuit-breakers", headers=admin).raise_for_status().json()["breakers"]
        return next(row["state"] for row in rows if row["name"] == "shipping")

    world.conduct("shipping", mode="broken")
    orders = [order(api, world.sku, quantity=1) for _ in range(8)]
    wait_until(lambda: state() == "open")
    world.conduct("shipping", mode="normal")
    assert {ended(api, workflow_id)["status"] for workflow_id in orders} == {"SUCCESS"}
    assert state() == "closed"
    assert world.shelf() == (2, 0)


def test_an_order_goes_on_where_redis_was_away(stack: Stack, api: httpx.Client, world: World) -> None:
    world.conduct("shipping", mode="slow", seconds=0.5)
    workflow_id = order(api, world.sku)
    wait_until(lambda: world.calls("shipping") >= 1)
    with paused(stack, "redis"):
        time.sleep(1)  # past the call, whose end the breaker is to be told of
    assert ended(api, workflow_id)["status"] == "SUCCESS"
    assert world.effects(workflow_id) == ALL_DONE
    assert world.shelf() == (8, 0)
