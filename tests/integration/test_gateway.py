"""The gateway: two services behind nginx, whole, stopped, slow and broken."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.integration.harness import Stack, paused, problem, stopped, wait_until

pytestmark = pytest.mark.integration


def refusal(answer: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    """The document of a problem that nginx answers in a service's place."""
    document = problem(answer, status, slug)
    assert document["error"] == document["title"]
    assert document["message"] == document["detail"]
    assert document["path"] == document["instance"] == answer.request.url.path
    assert document["status_code"] == status
    assert document["timestamp"].endswith("Z")
    if status != 404:
        assert 1 <= int(answer.headers["retry-after"]) <= 5
    return document


def told(api: httpx.Client, health: str) -> bool:
    """Whether the gateway says this of service1."""
    return api.get("/api/gateway/status").json()["services"]["service1"] == health


@contextmanager
def impostor(port: int, answer: bytes) -> Iterator[list[bytes]]:
    """Something else listens where a service should: it reads a request, says `answer` and hangs up."""
    requests = []

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                requests.append(connection.recv(65536))
                if answer:
                    connection.sendall(answer)

    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield requests
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(("name", "title"), [("service1", "Orders"), ("service2", "Fulfilment")])
def test_each_service_has_its_place_below_the_gateway(stack: Stack, api: httpx.Client, name: str, title: str) -> None:
    health = api.get(f"/api/{name}/health")
    assert health.status_code == 200
    assert health.json()["status"] == "healthy"
    assert health.json()["services"] == dict.fromkeys(("mongodb", "redis", "rabbitmq"), "connected")
    assert api.get(f"/api/{name}/openapi.json").json()["info"]["title"] == title
    for path in (f"/api/{name}", f"/api/{name}/"):
        assert api.get(path).json()["docs"] == f"/api/{name}/docs"
    port = stack.environment[f"{name.upper()}_PORT"]
    assert httpx.get(f"http://127.0.0.1:{port}/health").json()["status"] == "healthy"


def test_a_request_keeps_its_id_and_its_path_all_the_way(stack: Stack, api: httpx.Client) -> None:
    mine = uuid4().hex
    answer = api.get("/api/service1/nowhere/at?x=%2F", headers={"X-Request-ID": mine})
    assert problem(answer, 404, "not-found")["instance"] == "/api/service1/nowhere/at"
    assert answer.headers.get_list("x-request-id") == [mine]
    (line,) = wait_until(lambda: [line for line in stack.log("service1").splitlines() if mine in line])
    assert '"path": "/api/service1/nowhere/at"' in line


def test_the_gateway_lists_its_services_and_says_how_they_are(api: httpx.Client) -> None:
    listed = wait_until(
        lambda: (
            (found := api.get("/api/gateway/services").json())
            and all(one["health"] == "healthy" for one in found)
            and found
        )
    )
    assert [(one["name"], one["prefix"]) for one in listed] == [
        ("service1", "/api/service1"),
        ("service2", "/api/service2"),
    ]
    assert "127.0.0.1" not in str(listed)
    status = api.get("/api/gateway/status").json()
    assert status["status"] == "healthy"
    assert status["services"] == {"service1": "healthy", "service2": "healthy"}
    assert status["timestamp"].endswith("Z")


@pytest.mark.parametrize("path", ["/api/service9/orders", "/api/service9", "/api/service12/"])
def test_an_unknown_service_is_404(api: httpx.Client, path: str) -> None:
    assert "service" in refusal(api.get(path), 404, "not-found")["detail"]
    # Names that only begin alike are the API's.
    assert "error" not in problem(api.get("/api/serviceable"), 404, "not-found")


def test_a_stopped_service_is_503_and_all_others_are_served(stack: Stack, api: httpx.Client) -> None:
    api.get("/api/service1/health").raise_for_status()  # so that there may be an idle connection
    with stopped(stack, "service1"):
        for method in ("GET", "POST", "DELETE"):
            answer = api.request(method, "/api/service1/orders")
            assert "service1 does not run" in refusal(answer, 503, "unavailable")["detail"]
        assert api.get("/api/service2/fulfilments").status_code == 200
        assert api.get("/api/items").status_code == 200
        # Each replica remembers for a second what it was told.
        status = wait_until(
            lambda: (found := api.get("/api/gateway/status").json())["services"]["service1"] == "unreachable" and found
        )
        assert (status["status"], status["services"]["service2"]) == ("degraded", "healthy")
    assert api.get("/api/service1/orders").status_code == 200
    wait_until(lambda: told(api, "healthy"))


def test_a_slow_service_is_504_and_all_others_are_served(stack: Stack, api: httpx.Client) -> None:
    with paused(stack, "service1"):

        async def ask() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=stack.url, timeout=30) as client:
                slow = asyncio.create_task(client.get("/api/service1/orders"))
                others = ("/api/service2/fulfilments", "/api/items", "/api/gateway/status")
                quick = [await client.get(path) for path in others]
                assert not slow.done()
                return [await slow, *quick]

        slow, *others = asyncio.run(ask())
        assert {answer.status_code for answer in others} == {200}
        assert "did not answer within 3 s" in refusal(slow, 504, "gateway-timeout")["detail"]
        assert slow.elapsed.total_seconds() < 2 * 3  # it is not asked a second time
        wait_until(lambda: told(api, "slow"))
    assert api.get("/api/service1/orders").status_code == 200


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 20", b"HTTP/1.1 200 OK\r\nthis is no field\r\n\r\n"], ids=["closes", "half", "no-field"]
)
def test_a_broken_service_is_502_and_all_others_are_served(stack: Stack, api: httpx.Client, answer: bytes) -> None:
    with stopped(stack, "service1"), impostor(int(stack.environment["SERVICE1_PORT"]), answer) as requests:
        document = refusal(api.get("/api/service1/orders"), 502, "bad-gateway")
        assert "service1 gave no valid answer" in document["detail"]
        assert requests[0].startswith(b"GET /orders HTTP/1.1\r\n")
        wait_until(lambda: told(api, "broken"))
        assert api.get("/api/service2/fulfilments").status_code == 200
        assert api.get("/api/items").status_code == 200
    assert api.get("/api/service1/orders").status_code == 200


def test_without_the_api_the_services_are_served(stack: Stack, api: httpx.Client) -> None:
    with stopped(stack, "api-1", "api-2"):
        assert api.get("/api/items").status_code == 502
        assert api.get("/api/service1/orders").status_code == 200
        assert api.get("/api/service2/fulfilments").status_code == 200
        assert api.get("/api/service2/health").json()["status"] == "healthy"


def test_a_client_names_no_service_and_no_identity(stack: Stack, api: httpx.Client) -> None:
    """What nginx tells a service of a request is its own, whatever the client sends."""
    forged = {"X-Edge-Request-Id": "f" * 32, "X-Forwarded-For": "9.9.9.9"}
    body = {"customer_id": "ann", "lines": [{"sku": "lamp-7", "quantity": 1}]}
    made = [api.post("/api/service1/orders", json=body, headers=forged).raise_for_status().json() for _ in range(2)]
    assert made[0]["id"] != made[1]["id"]
    with stopped(stack, "service1"), impostor(int(stack.environment["SERVICE1_PORT"]), b"") as requests:
        api.get("/api/service1/orders", headers=forged)
    (sent,) = requests
    assert b"9.9.9.9" not in sent
    assert b"f" * 32 not in sent
    assert b"X-Forwarded-For: 127.0.0.1\r\n" in sent
