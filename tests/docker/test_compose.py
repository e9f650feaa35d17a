"""The stack for development, through nginx: what is published, that a killed replica loses nothing, scaling, limits."""

import asyncio
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.docker.harness import Stack, final_status, run, submit, wait_until

TASKS = 200


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    running = Stack("stack-test")
    try:
        running.up("--build")
        yield running
    finally:
        running.down()


@pytest.fixture
def client(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.http, timeout=30) as opened:
        yield opened


def test_only_nginx_and_the_local_management_page_are_published(stack: Stack) -> None:
    published = {
        (container["Service"], port["URL"] == "127.0.0.1", port["TargetPort"])
        for container in stack.containers()
        for port in container["Publishers"] or []
        if port["PublishedPort"]
    }
    assert published == {("nginx", False, 8080), ("rabbitmq", True, 15672)}
    page = stack.environment["RABBITMQ_PAGE_PORT"]
    assert httpx.get(f"http://127.0.0.1:{page}/api/overview", auth=("guest", "guest")).status_code == 200


def test_every_container_has_a_health_check_that_passes(stack: Stack) -> None:
    containers = stack.containers()
    assert {container["Health"] for container in containers} == {"healthy"}
    services = [container["Service"] for container in containers]
    assert services.count("api") == 3
    assert services.count("celery_worker") == 3
    assert set(services) == {
        "nginx",
        "api",
        "celery_worker",
        "celery_light",
        "beat",
        "audit",
        "service1",
        "service2",
        "outside",
        "mongodb",
        "redis",
        "rabbitmq",
    }


def test_the_application_runs_without_rights(stack: Stack) -> None:
    for service in ("api", "celery_worker", "beat", "service1", "service2", "outside"):
        script = "id -u; touch /srv/app/x 2>&1; grep CapEff /proc/self/status"
        told = stack.compose("exec", "-T", service, "sh", "-c", script)
        assert told.stdout.splitlines()[0] == "10001"
        assert "Read-only file system" in told.stdout
        assert told.stdout.split()[-1].strip("0") == ""


def test_items_documentation_and_health_are_served(client: httpx.Client) -> None:
    health = client.get("/health")
    assert health.json()["services"] == {"mongodb": "connected", "redis": "connected", "rabbitmq": "connected"}
    created = client.post("/api/items", json={"name": "a", "metadata": {"long": "x" * 4000}})
    assert created.status_code == 201
    read = client.get(created.headers["Location"])
    assert read.json()["name"] == "a"
    # Compressed, the tag would be a weak one and If-Match would refuse it.
    assert created.headers["ETag"] == read.headers["ETag"]
    assert not read.headers["ETag"].startswith("W/")
    assert client.get("/api/items").headers["Content-Encoding"] == "gzip"
    assert "swagger" in client.get("/docs").text
    assert client.get("/openapi.json").status_code == 200


def test_request_ids(client: httpx.Client, stack: Stack) -> None:
    for path in ("/health", "/api/items", "/metrics", "/nowhere"):
        response = client.get(path, headers={"X-Request-ID": "from.the-client_1"})
        assert response.headers.get_list("X-Request-ID") == ["from.the-client_1"], path
        response = client.get(path, headers={"X-Request-ID": 'not "harmless"'})
        (made,) = response.headers.get_list("X-Request-ID")
        assert len(made) == 32, path
    task = submit(client, 1).raise_for_status()
    wait_until(lambda: final_status(client, task.json()["task_id"]))
    # The same id is in the lines of whoever had a part in it.
    lines = stack.compose("logs", "--no-log-prefix", "nginx", "api").stdout.splitlines()
    assert sum(task.headers["X-Request-ID"] in line for line in lines) >= 2


def test_metrics_are_not_for_the_outside(client: httpx.Client) -> None:
    response = client.get("/metrics")
    assert response.status_code == 404
    assert response.headers["Content-Type"] == "application/problem+json"


def test_a_client_cannot_choose_its_address(client: httpx.Client, stack: Stack) -> None:
    client.get("/health", headers={"X-Forwarded-For": "192.0.2.7", "X-Request-ID": "forged-address"})
    (line,) = (line for line in stack.access_log() if line["request_id"] == "forged-address")
    assert line["client"] != "192.0.2.7"


async def test_killed_containers_lose_no_task(stack: Stack) -> None:
    names = {service: stack.containers(service)[0]["Name"] for service in ("api", "celery_worker")}
    async with httpx.AsyncClient(base_url=stack.http, timeout=60, limits=httpx.Limits(max_connections=16)) as client:
        # Each about 0.1 s of work, so that some are running whenever the kill comes.
        submits = [asyncio.create_task(submit(client, iterations=200)) for _ in range(TASKS)]
        await asyncio.sleep(1)
        await asyncio.to_thread(run, "docker", "kill", "-s", "KILL", *names.values())
        answers = await asyncio.gather(*submits)
    assert {answer.status_code for answer in answers} == {202}
    waiting = {answer.json()["task_id"] for answer in answers}
    assert len(waiting) == TASKS

    documents = []

    def all_final() -> bool:
        for task_id in sorted(waiting):
            if document := final_status(client, task_id):
                documents.append(document)
                waiting.remove(task_id)
        return not waiting

    with httpx.Client(base_url=stack.http, timeout=30) as client:
        wait_until(all_final, seconds=180)
    assert {document["status"] for document in documents} == {"SUCCESS"}
    assert {document["result"]["total_processed"] for document in documents} == {200}
    stack.up()  # a killed container stays away: the engine takes it for stopped by hand


def test_scaling_is_seen_by_nginx_without_a_reload(client: httpx.Client, stack: Stack) -> None:
    (before,) = stack.containers("nginx")
    stack.up("--no-recreate", "--scale", "api=5", "--scale", "celery_worker=5")

    def five_answered() -> bool:
        since = time.time()
        for number in range(10):
            client.get("/", headers={"X-Request-ID": f"scale-{since}-{number}"})
        lines = [line for line in stack.access_log() if line["request_id"].startswith(f"scale-{since}-")]
        return len({line["upstream"] for line in lines}) == 5

    wait_until(five_answered, seconds=30)
    (after,) = stack.containers("nginx")
    assert after["ID"] == before["ID"]
    consumers = stack.compose("exec", "-T", "rabbitmq", "rabbitmqctl", "-q", "list_queues", "name", "consumers").stdout
    assert "heavy\t5" in consumers
    stack.up("--no-recreate", "--scale", "api=3", "--scale", "celery_worker=3")


async def test_too_many_requests_are_refused_with_a_problem(stack: Stack) -> None:
    async with httpx.AsyncClient(base_url=stack.http, timeout=60, limits=httpx.Limits(max_connections=400)) as client:
        answers = await asyncio.gather(*(client.get("/") for _ in range(400)), client.get("/health"))
    assert answers.pop().status_code == 200
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in refused:
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.headers["Cache-Control"] == "no-store"
        problem = answer.json()
        assert problem["type"] == "urn:problem:rate-limited"
        assert problem["status"] == problem["status_code"] == 429
        assert problem["request_id"] == answer.headers["X-Request-ID"]
    waits = {int(answer.headers["Retry-After"]) for answer in refused}
    assert len(waits) > 1
    assert waits <= {1, 2, 3, 4, 5}


def test_without_a_replica_nginx_answers_for_them(client: httpx.Client, stack: Stack) -> None:
    stack.compose("stop", "-t", "5", "api")
    try:
        answer = wait_until(lambda: (found := client.get("/health")).status_code == 502 and found, seconds=20)
        assert answer.json()["type"] == "urn:problem:bad-gateway"
        assert int(answer.headers["Retry-After"]) >= 1
        stack.compose("restart", "nginx")
        wait_until(lambda: [c for c in stack.containers("nginx") if c["Health"] == "healthy"])
        assert client.get("/health").status_code == 502
    finally:
        stack.up()
    wait_until(lambda: client.get("/health").status_code == 200, seconds=20)


def test_an_order_is_fulfilled_across_the_services(client: httpx.Client) -> None:
    body = {"customer_id": "ann", "lines": [{"sku": "lamp-7", "quantity": 1}]}
    placed = client.post("/api/service1/orders", json=body)
    assert placed.status_code == 201
    order = placed.headers["Location"]
    wait_until(lambda: client.get(order).json()["status"] == "FULFILLED", seconds=30)
    assert client.get(f"/api/service2/fulfilments/{placed.json()['id']}").json()["customer_id"] == "ann"
    assert client.get("/api/gateway/status").json()["services"] == {"service1": "healthy", "service2": "healthy"}


def test_only_who_has_to_reaches_a_service(stack: Stack) -> None:
    def reaches(service: str, host: str) -> bool:
        probe = f"exec 3<>/dev/tcp/{host.replace(':', '/')}"
        return stack.compose("exec", "-T", service, "timeout", "3", "bash", "-c", probe, check=False).returncode == 0

    assert reaches("nginx", "service1:8001")
    assert reaches("nginx", "service2:8002")
    assert not reaches("nginx", "outside:8003")
    assert reaches("celery_worker", "outside:8003")


def test_nginx_starts_and_serves_others_without_a_service(client: httpx.Client, stack: Stack) -> None:
    stack.compose("stop", "-t", "5", "service1")
    try:
        for restart in (False, True):
            if restart:
                stack.compose("restart", "nginx")
                wait_until(lambda: [c for c in stack.containers("nginx") if c["Health"] == "healthy"])
            answer = wait_until(
                lambda: (found := client.get("/api/service1/orders")).status_code == 503 and found, seconds=20
            )
            assert answer.json()["type"] == "urn:problem:unavailable"
            assert "service1" in answer.json()["detail"]
            assert int(answer.headers["Retry-After"]) >= 1
            assert wait_until(lambda: client.get("/api/items").status_code == 200, seconds=20)
            assert client.get("/api/service2/fulfilments").status_code == 200
        services = wait_until(
            lambda: (told := client.get("/api/gateway/status").json())["services"]["service1"] == "unreachable" and told
        )
        assert services["services"]["service2"] == "healthy"
    finally:
        stack.up()
    wait_until(lambda: client.get("/api/service1/orders").status_code == 200, seconds=20)


@pytest.mark.parametrize(
    "command",
    [
        ["uvicorn", "app.main:create_app", "--factory"],
        ["uvicorn", "app.backends.service1:create_app", "--factory"],
        ["celery", "-A", "app.worker", "worker", "-Q", "heavy"],
        ["python", "-m", "app.beat"],
    ],
    ids=lambda command: command[1],
)
def test_production_refuses_default_passwords(stack: Stack, command: list[str]) -> None:
    url = "amqp://guest:guest@rabbitmq:5672//"
    image = stack.environment["APP_IMAGE"]
    environment = ["-e", "ENVIRONMENT=production", "-e", f"RABBITMQ_URL={url}"]
    done = run("docker", "run", "--rm", *environment, image, *command, check=False)
    assert done.returncode != 0
    assert "RABBITMQ_URL" in done.stderr
    assert "default or empty password" in done.stderr
    assert url not in done.stderr
