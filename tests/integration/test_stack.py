import re
import socket
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import httpx
import pytest

from tests.integration.harness import Stack, problem, wait_until

pytestmark = pytest.mark.integration


def test_health_names_each_server(api: httpx.Client) -> None:
    answer = api.get("/health")
    assert answer.status_code == 200
    document = answer.json()
    assert document["status"] == "healthy"
    assert document["services"] == dict.fromkeys(("mongodb", "redis", "rabbitmq"), "connected")
    assert document["timestamp"].endswith("Z")
    assert api.get("/health/ready").status_code == 200
    assert api.get("/health/live").json() == {"status": "ok"}


def test_root_links_to_what_is_there(api: httpx.Client) -> None:
    document = api.get("/").json()
    assert document.pop("status") == "ok"
    for path in document.values():
        assert api.get(path).status_code in (200, 405), path


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_documentation_needs_no_other_host(api: httpx.Client, page: str) -> None:
    html = api.get(page).text
    assets = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert assets
    for asset in assets:
        assert asset.startswith("/"), asset
        assert api.get(asset).status_code == 200, asset


def test_request_id_is_kept_or_made_and_comes_once(api: httpx.Client) -> None:
    given = api.get("/health", headers={"X-Request-ID": "mine.1_2-3"})
    assert given.headers.get_list("x-request-id") == ["mine.1_2-3"]
    for malformed in ("a b", "x" * 65, 'a"b'):
        made = api.get("/health", headers={"X-Request-ID": malformed})
        (request_id,) = made.headers.get_list("x-request-id")
        assert re.fullmatch(r"[0-9a-f]{32}", request_id)


def test_both_replicas_serve(api: httpx.Client, stack: Stack) -> None:
    for number in range(20):
        api.get("/api/items", headers={"X-Request-ID": f"spread-{number}"})
    for replica in ("api-1", "api-2"):
        assert "spread-" in stack.log(replica)


def test_unknown_paths_and_methods_are_problems(api: httpx.Client) -> None:
    problem(api.get("/nowhere"), 404, "not-found")
    answer = api.put("/api/async/process")
    problem(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == "POST"


def test_what_is_no_request_for_the_api_is_a_problem_too(api: httpx.Client, stack: Stack) -> None:
    problem(api.request("FOO", "/api/items"), 405, "method-not-allowed")
    host, port = stack.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET /api/\xff HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"application/problem+json" in answer


def test_nobody_chooses_the_address_that_is_counted(api: httpx.Client, stack: Stack) -> None:
    mine = uuid4().hex
    api.get("/health/live", headers={"X-Request-ID": mine, "X-Forwarded-For": "9.9.9.9"})
    (line,) = wait_until(lambda: [line for line in stack.log("nginx").splitlines() if mine in line])
    assert '"client":"127.0.0.1"' in line


def test_metrics_are_nobodys_business(api: httpx.Client) -> None:
    problem(api.get("/metrics"), 404, "not-found")


def test_body_past_the_limit_is_refused(api: httpx.Client) -> None:
    problem(api.post("/api/items", content=b"x" * 1_100_000), 413, "body-too-large")


def test_answers_do_not_name_the_software(api: httpx.Client) -> None:
    assert api.get("/health").headers.get("server", "nginx") == "nginx"


def test_rate_limits_answer_429_with_a_time_to_come_back(stack: Stack) -> None:
    stack.run("up", "--no-demo", NGINX_RATE="5", NGINX_BURST="2", NGINX_SUBMIT_RATE="2", NGINX_SUBMIT_BURST="1")
    try:
        with httpx.Client(base_url=stack.url, limits=httpx.Limits(max_connections=30)) as client:
            for method, path, body in (("GET", "/api/items", None), ("POST", "/api/async/process", {"data": "x"})):
                answers = at_once(client, method, path, body)
                assert {answer.status_code for answer in answers} <= {200, 202, 429}
                refused = [answer for answer in answers if answer.status_code == 429]
                assert refused
                document = problem(refused[0], 429, "rate-limited")
                assert document["instance"] == path
                assert int(refused[0].headers["retry-after"]) >= 1
            assert client.get("/health").status_code == 200
    finally:
        stack.run("up", "--no-demo")


def at_once(client: httpx.Client, method: str, path: str, body: object) -> list[httpx.Response]:
    with ThreadPoolExecutor(20) as pool:
        return list(pool.map(lambda _: client.request(method, path, json=body), range(20)))
