"""The native stack as tests run it, and what they often ask of it."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil
import redis

from app.context import Context
from app.settings import Settings
from deploy.native.layout import Layout
from deploy.native.ports import free_ports, why_not
from deploy.native.supervision import Supervisor

ROOT = Path(__file__).parents[2]
PORTS = (
    "NGINX_PORT",
    "REDIS_PORT",
    "RABBITMQ_PORT",
    "RABBITMQ_MANAGEMENT_PORT",
    "RABBITMQ_PROMETHEUS_PORT",
    "RABBITMQ_DIST_PORT",
    "EPMD_PORT",
    "MONGODB_PORT",
    "SERVICE1_PORT",
    "SERVICE2_PORT",
    "OUTSIDE_PORT",
)
FINAL = {"SUCCESS", "FAILURE", "CANCELLED"}


def wait_until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """What `condition` answers once that is truthy; fails when it is not in time."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return answer


class Stack:
    """A running stack: its addresses, its settings, its processes."""

    def __init__(self, directory: Path) -> None:
        # Replicas get consecutive ports: the last one leaves room for some more.
        first = free_row(len(PORTS) + 4)
        ports = dict(zip((*PORTS, "API_PORT"), itertools.count(first), strict=False))
        self.environment = {
            **{name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields},
            **{name: str(port) for name, port in ports.items()},
            "STACK_DIR": str(directory),
            "TASK_MODULES": "tests.integration.tasks",
            "WORKFLOW_MODULES": "tests.integration.workflows",
            "WORKFLOWS_LOOK_AFTER": "1",
            "PUBLISH_TIMEOUT": "2",
            "RECONCILE_AFTER": "2",
            "RECONCILE_INTERVAL": "0.5",
            "RECOVERY_TIME": "3",
            "QUOTA_TIMEOUT": "3",  # so that a busy machine's delay is not taken for that of Redis
            "LIGHT_SOFT_TIME_LIMIT": "3",
            "LIGHT_TIME_LIMIT": "5",
            "OUTSIDE_TIMEOUT": "1",
            "BREAKER_OPEN_SECONDS": "1",
            "WORKER_SOFT_SHUTDOWN_TIMEOUT": "1",
            "GATEWAY_TIMEOUT": "3",
            "NGINX_RATE": "100000",
            "NGINX_BURST": "10000",
            "NGINX_SUBMIT_RATE": "100000",
            "NGINX_SUBMIT_BURST": "10000",
        }
        self.url = f"http://127.0.0.1:{ports['NGINX_PORT']}"
        self.replicas = [f"http://127.0.0.1:{ports['API_PORT'] + number}" for number in range(2)]
        self.outside = f"http://127.0.0.1:{ports['OUTSIDE_PORT']}"
        self.management = f"http://127.0.0.1:{ports['RABBITMQ_MANAGEMENT_PORT']}"
        self.layout = Layout(directory.resolve())
        self.settings = Settings(
            _env_file=None,
            redis_url=f"redis://127.0.0.1:{ports['REDIS_PORT']}/0",
            rabbitmq_url=f"amqp://guest:guest@127.0.0.1:{ports['RABBITMQ_PORT']}//",
            mongodb_url=f"mongodb://127.0.0.1:{ports['MONGODB_PORT']}/?directConnection=true",
            publish_timeout=2,
            workflow_modules=("tests.integration.workflows",),
            workflows_look_after=1,
        )

    def run(self, *words: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the stack, as make does."""
        return subprocess.run(
            [sys.executable, "-m", "deploy.native.stack", *words],
            cwd=ROOT,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=180,
            check=check,
        )

    def pid(self, service: str) -> int:
        """The process id of a service, as its supervisor knows it."""
        return Supervisor(self.layout).processes()[service].pid

    def processes(self, service: str) -> list[psutil.Process]:
        """A service's process and all below it."""
        parent = psutil.Process(self.pid(service))
        return [parent, *parent.children(recursive=True)]

    def log(self, service: str) -> str:
        """What a service has logged so far."""
        return self.layout.log(service).read_text(errors="replace")

    def settled(self) -> bool:
        """Whether all services are healthy."""
        return self.run("status", check=False).returncode == 0


@contextmanager
def paused(stack: Stack, service: str) -> Iterator[None]:
    """Stop a server without closing its connections, as a machine that hangs does."""
    processes = stack.processes(service)
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


@contextmanager
def stopped(stack: Stack, *services: str) -> Iterator[None]:
    """Stop processes of the stack, and start them again."""
    supervisor = Supervisor(stack.layout)
    supervisor.stop(list(services))
    try:
        yield
    finally:
        for service in services:
            supervisor.start(service)
        wait_until(stack.settled, 60)


@contextmanager
def replica(stack: Stack, **settings: str) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    """A replica beside those of the stack, with settings of its own."""
    (port,) = free_ports(1)
    environment = {
        **stack.environment,
        "REDIS_URL": stack.settings.redis_url.get_secret_value(),
        "RABBITMQ_URL": stack.settings.rabbitmq_url.get_secret_value(),
        "MONGODB_URL": stack.settings.mongodb_url.get_secret_value(),
        **settings,
    }
    words = [
        "-m",
        "uvicorn",
        "app.main:create_app",
        "--factory",
        "--port",
        str(port),
        "--no-proxy-headers",
        "--log-level",
        "error",
    ]
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:

            def answers() -> bool:
                try:
                    return client.get("/health/live").status_code == 200
                except httpx.TransportError:
                    return False

            wait_until(answers)
            yield client, process
    finally:
        process.terminate()
        process.wait(30)


def made_by(records: redis.Redis, request_id: str) -> dict[str, dict[str, str]]:
    """The records of all tasks that requests of this id made, by the task's id."""
    found = {key.removeprefix("task:"): records.hgetall(key) for key in records.scan_iter("task:*", count=1000)}
    return {task_id: record for task_id, record in found.items() if record.get("request_id") == request_id}


def free_row(count: int) -> int:
    """The first of `count` consecutive free ports.

    Below those that the system gives to outgoing connections: one of these could take the port of a server that is
    being restarted.
    """
    while True:
        first = random.randrange(10_000, 32_000)
        if not any(why_not(port) for port in range(first, first + count)):
            return first


def submit(api: httpx.Client, data: str = "hello", iterations: int = 20, **fields: Any) -> str:
    """The id of a new heavy task."""
    answer = api.post("/api/async/process", json={"data": data, "iterations": iterations, **fields})
    assert answer.status_code == 202, answer.text
    return answer.json()["task_id"]


def finished(api: httpx.Client, task_id: str, seconds: float = 30) -> dict[str, Any]:
    """A task's status document once it is final."""

    def look() -> dict[str, Any] | None:
        document = api.get(f"/api/async/status/{task_id}").raise_for_status().json()
        return document if document["status"] in FINAL else None

    return wait_until(look, seconds)


async def start(context: Context, name: str, queue: str, payload: dict[str, object]) -> str:
    """The id of a new task that has no route."""
    accepted = await context.tasks.submit(
        name, payload, task_id=str(uuid4()), digest="", request_id=uuid4().hex, queue=queue
    )
    return accepted.task_id


def problem(answer: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    """The document of an answer that must be this problem."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert document["type"] == f"urn:problem:{slug}"
    assert document["status"] == status
    assert document["request_id"] == answer.headers["x-request-id"]
    assert {"title", "detail", "instance"} <= document.keys()
    return document


def command(stack: Stack, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m app` with what the stack's ports are, and nothing else that would lead it there."""
    return subprocess.run(
        [sys.executable, "-m", "app", *words],
        cwd=ROOT,
        env={**stack.environment, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def new_key(stack: Stack, *options: str) -> str:
    made = command(stack, "api-keys", "create", "--name", "test", *options)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def bearer(key: str, **others: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", **others}
