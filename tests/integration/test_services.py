"""Orders and fulfilment: two services that know each other by events alone."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import httpx
import pymongo
import pytest

from app.context import Context
from app.contracts import EventName, OrderFulfilled, OrderPlaced
from app.engine.envelope import Event
from tests.integration.harness import Stack, bearer, finished, new_key, paused, problem, stopped, wait_until

pytestmark = pytest.mark.integration

LINES = [{"sku": "lamp-7", "quantity": 2}, {"sku": "chair-1", "quantity": 1}]
ORDERS, FULFILMENTS = "/api/service1/orders", "/api/service2/fulfilments"


@pytest.fixture
def database(stack: Stack) -> Iterator[pymongo.database.Database[Any]]:
    with pymongo.MongoClient(stack.settings.mongodb_url.get_secret_value()) as client:
        yield client["stack"]


@pytest.fixture(params=["service1", "service2"])
def alone(stack: Stack, request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    """A client of one service, without nginx, while the other one, the API and beat are stopped."""
    other = "service2" if request.param == "service1" else "service1"
    with (
        stopped(stack, other, "api-1", "api-2", "beat", "nginx"),
        httpx.Client(
            base_url=f"http://127.0.0.1:{stack.environment[f'{request.param.upper()}_PORT']}", timeout=30
        ) as client,
    ):
        yield client


def place(client: httpx.Client, *, url: str = ORDERS, customer: str = "ann", **headers: str) -> httpx.Response:
    return client.post(url, json={"customer_id": customer, "lines": LINES}, headers=headers)


def order(client: httpx.Client, **headers: str) -> str:
    """The id of a new order."""
    answer = place(client, **headers)
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def fulfilled(client: httpx.Client, order_id: str, **headers: str) -> dict[str, Any]:
    """An order once it is fulfilled."""

    def look() -> dict[str, Any] | None:
        found = client.get(f"{ORDERS}/{order_id}", headers=headers).raise_for_status().json()
        return found if found["status"] == "FULFILLED" else None

    return wait_until(look, 60)


def test_an_order_is_placed_and_fulfilled_across_both_services(
    api: httpx.Client, database: pymongo.database.Database[Any]
) -> None:
    answer = place(api)
    placed = answer.json()
    assert (answer.status_code, placed["status"], placed["fulfilled_at"]) == (201, "PLACED", None)
    assert answer.headers["location"] == f"{ORDERS}/{placed['id']}"
    assert (placed["customer_id"], placed["lines"]) == ("ann", LINES)
    done = fulfilled(api, placed["id"])
    assert done["fulfilled_at"] >= placed["created_at"]
    told = api.get(f"{FULFILMENTS}/{placed['id']}").raise_for_status().json()
    assert (told["order_id"], told["customer_id"], told["lines"]) == (placed["id"], "ann", LINES)
    rows = database["outbox"].find({"data": {"$regex": placed["id"]}})
    assert Counter(row["type"] for row in rows) == {"order.placed": 1, "order.fulfilled": 1}


def test_the_same_key_makes_one_order_and_another_body_is_refused(
    api: httpx.Client, database: pymongo.database.Database[Any]
) -> None:
    key = {"Idempotency-Key": uuid4().hex}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: place(api, **key), range(8)))
    assert {answer.status_code for answer in answers} == {201}
    (order_id,) = {answer.json()["id"] for answer in answers}
    assert Counter(answer.headers.get("idempotent-replayed") for answer in answers) == {None: 1, "true": 7}
    problem(place(api, customer="bob", **key), 422, "key-reused")
    fulfilled(api, order_id)
    assert database["fulfilments"].count_documents({"order_id": order_id}) == 1
    assert database["outbox"].count_documents({"type": "order.placed", "data": {"$regex": order_id}}) == 1


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"customer_id": "ann", "lines": []},
        {"customer_id": "ann", "lines": [{"sku": "lamp-7", "quantity": 0}]},
        {"customer_id": "ann", "lines": LINES, "status": "FULFILLED"},
        {"customer_id": "", "lines": LINES},
    ],
)
def test_an_order_that_is_none_is_refused(api: httpx.Client, body: dict[str, Any]) -> None:
    document = problem(api.post(ORDERS, json=body), 422, "invalid")
    assert document["instance"] == ORDERS
    assert document["errors"]


def test_what_is_not_there_is_404_and_what_cannot_be_is_refused(api: httpx.Client) -> None:
    for path in (f"{ORDERS}/{'0' * 24}", f"{ORDERS}/x", f"{FULFILMENTS}/{'0' * 24}", f"{FULFILMENTS}/x"):
        assert problem(api.get(path), 404, "not-found")["instance"] == path
    for path in (ORDERS, FULFILMENTS):
        problem(api.get(path, params={"cursor": "x"}), 422, "invalid")
        problem(api.get(path, params={"limit": 101}), 422, "invalid")
    answer = api.delete(ORDERS)
    problem(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == "GET, POST"


def test_an_order_belongs_to_the_key_that_made_it(stack: Stack, api: httpx.Client) -> None:
    mine, others, admins = (bearer(new_key(stack, *words)) for words in ((), (), ("--admin",)))
    order_id = order(api, **mine)
    fulfilled(api, order_id, **mine)
    for path in (f"{ORDERS}/{order_id}", f"{FULFILMENTS}/{order_id}"):
        assert api.get(path, headers=mine).status_code == 200
        assert api.get(path, headers=admins).status_code == 200
        problem(api.get(path, headers=others), 404, "not-found")
        problem(api.get(path), 404, "not-found")
    for path, name in ((ORDERS, "orders"), (FULFILMENTS, "fulfilments")):
        assert len(api.get(path, headers=mine).json()[name]) == 1
        assert api.get(path, headers=others).json() == {name: [], "next_cursor": None}
        problem(api.get(path, headers=bearer("stack_no_key")), 401, "unauthorized")
    problem(api.post(f"{FULFILMENTS}/{order_id}/slip", headers=others), 404, "not-found")


def test_pages_have_everything_once_in_order(stack: Stack, api: httpx.Client) -> None:
    mine = bearer(new_key(stack))
    made = [order(api, **mine) for _ in range(5)]
    for order_id in made:
        fulfilled(api, order_id, **mine)
    for path, name, field in ((ORDERS, "orders", "id"), (FULFILMENTS, "fulfilments", "order_id")):
        found, following = [], f"{path}?limit=2"
        while following:
            answer = api.get(following, headers=mine).raise_for_status()
            found += [row[field] for row in answer.json()[name]]
            following = answer.links.get("next", {}).get("url")
            assert (following is None) == (answer.json()["next_cursor"] is None)
        assert sorted(found) == sorted(made)
        assert path == FULFILMENTS or found == made


def test_a_service_has_a_task_done_that_it_only_names(stack: Stack, api: httpx.Client) -> None:
    order_id, other = order(api), order(api)
    for one in (order_id, other):
        fulfilled(api, one)
    key = {"Idempotency-Key": uuid4().hex}
    answer = api.post(f"{FULFILMENTS}/{order_id}/slip", headers={**key, "X-Request-ID": "slip-1"})
    assert answer.status_code == 202
    task_id = answer.json()["task_id"]
    assert answer.headers["location"] == answer.json()["status_url"] == f"/api/async/status/{task_id}"
    again = api.post(f"{FULFILMENTS}/{order_id}/slip", headers=key)
    assert (again.json()["task_id"], again.headers["idempotent-replayed"]) == (task_id, "true")
    problem(api.post(f"{FULFILMENTS}/{other}/slip", headers=key), 422, "key-reused")
    document = finished(api, task_id)
    assert (document["status"], document["result"]["words"]) == ("SUCCESS", 6)  # For ann: 2 lamp-7 1 chair-1
    assert wait_until(lambda: "slip-1" in stack.log("light-1"))


def test_orders_placed_while_fulfilment_is_stopped_are_fulfilled_once_after_it_starts(
    stack: Stack, api: httpx.Client, database: pymongo.database.Database[Any]
) -> None:
    with stopped(stack, "service2"):
        with ThreadPoolExecutor(5) as pool:
            made = list(pool.map(lambda _: order(api), range(20)))
        problem(api.get(f"{FULFILMENTS}/{made[0]}"), 503, "unavailable")
        assert {api.get(f"{ORDERS}/{one}").json()["status"] for one in made} == {"PLACED"}
    for one in made:
        fulfilled(api, one)
    rows = database["fulfilments"].find({"order_id": {"$in": made}})
    assert Counter(row["order_id"] for row in rows) == dict.fromkeys(made, 1)


def test_a_killed_fulfilment_fulfils_each_order_once(
    stack: Stack, api: httpx.Client, database: pymongo.database.Database[Any]
) -> None:
    made = []
    for number in range(30):
        made.append(order(api))
        if number % 10 == 5:
            stack.processes("service2")[0].kill()
            wait_until(lambda: api.get("/api/service2/health").status_code == 200, 60)
    for one in made:
        fulfilled(api, one)
    rows = database["fulfilments"].find({"order_id": {"$in": made}})
    assert Counter(row["order_id"] for row in rows) == dict.fromkeys(made, 1)
    wait_until(stack.settled, 60)


async def test_an_event_that_comes_twice_fulfils_once(
    context: Context, api: httpx.Client, database: pymongo.database.Database[Any]
) -> None:
    order_id = order(api)
    fulfilled(api, order_id)
    data = OrderPlaced.model_validate({"order_id": order_id, "customer_id": "ann", "lines": LINES})
    # The same order in another event, and that event twice; then one that tells of the end of the line.
    for event_id in ("twice-" + order_id, "twice-" + order_id, "third-" + order_id):
        await context.publisher.emit(Event.new(event_id, data, kind=EventName.ORDER_PLACED, source="/tests").document())
    strange = OrderFulfilled(order_id="no such order")
    await context.publisher.emit(
        Event.new("strange-" + order_id, strange, kind=EventName.ORDER_FULFILLED, source="/tests").document()
    )
    last = order(api)
    fulfilled(api, last)
    handled = [f"fulfilment /tests {word}-{order_id}" for word in ("twice", "third")]
    handled.append(f"orders /tests strange-{order_id}")
    markers = database["event_markers"]
    wait_until(lambda: markers.count_documents({"_id": {"$in": handled}, "state": "handled"}) == len(handled))
    assert database["fulfilments"].count_documents({"order_id": order_id}) == 1
    assert database["outbox"].count_documents({"type": "order.fulfilled", "data": {"$regex": order_id}}) == 1


def test_orders_are_taken_while_the_broker_is_away(stack: Stack, api: httpx.Client) -> None:
    with paused(stack, "rabbitmq"):
        made = [order(api) for _ in range(3)]

        def degraded() -> bool:
            health = api.get("/api/service1/health")
            assert health.status_code == 200
            return health.json()["services"]["rabbitmq"] == "disconnected" and health.json()["status"] == "degraded"

        wait_until(degraded)
    for order_id in made:
        fulfilled(api, order_id)


def test_without_mongodb_a_service_says_what_is_missing(stack: Stack, api: httpx.Client) -> None:
    with paused(stack, "database"):
        problem(api.get(ORDERS, headers={}), 504, "gateway-timeout")  # GATEWAY_TIMEOUT is below MONGODB_TIMEOUT here

        def unhealthy() -> bool:
            health = api.get("/api/service2/health")
            return health.status_code == 503 and health.json()["services"]["mongodb"] == "disconnected"

        wait_until(unhealthy)
        assert api.get("/api/gateway/status").json()["services"]["service2"] in ("unhealthy", "slow")
    wait_until(stack.settled, 60)
    wait_until(lambda: api.get("/api/gateway/status").json()["status"] == "healthy")


def test_each_service_serves_alone(alone: httpx.Client, stack: Stack) -> None:
    """The other one, the API, beat and nginx are stopped; what happened is told when they are back."""
    assert alone.get("/health").json()["status"] == "healthy"
    title = alone.get("/openapi.json").json()["info"]["title"]
    if title == "Orders":
        answer = place(alone, url="/orders")
        assert answer.status_code == 201
        # A service's own paths and those of the gateway both lead there.
        for path in (answer.headers["location"], f"/orders/{answer.json()['id']}"):
            assert alone.get(path).json()["status"] == "PLACED"
    else:
        assert alone.get("/fulfilments").status_code == 200
        problem(alone.get("/fulfilments/x"), 404, "not-found")
    # It restarts alone, too.
    name = "service1" if title == "Orders" else "service2"
    stack.processes(name)[0].kill()

    def again() -> bool:
        try:
            return alone.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    wait_until(again, 60)
