"""The compose stack as tests run it: a project, ports and a subnet of its own beside whatever else runs."""

import json
import os
import random
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
IMAGE = "concurrent-api-stack-test"
START_SECONDS = 600  # the first build downloads the packages


def wait_until(condition: Callable[[], Any], seconds: float = 60, every: float = 0.5) -> Any:
    """What `condition` answers once that is truthy; fails when it is not in time."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every)
    return answer


def run(*words: str, check: bool = True, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout; a failure shows what it said."""
    done = subprocess.run(
        words,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(words)}\n{done.stdout}\n{done.stderr}")
    return done


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    listeners = [socket.create_server(("", 0)) for _ in range(count)]
    try:
        return [listener.getsockname()[1] for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


class Stack:
    """One compose project."""

    def __init__(self, project: str, *overlays: str, **environment: str) -> None:
        http, https, page = free_ports(3)
        self.project = f"{project}-{os.getpid()}"
        self.files = ("docker-compose.yml", *overlays)
        self.environment = {
            "APP_IMAGE": IMAGE,
            "HTTP_PORT": str(http),
            "HTTPS_PORT": str(https),
            "RABBITMQ_PAGE_PORT": str(page),
            "EDGE_SUBNET": f"10.{random.randint(200, 250)}.{random.randint(0, 255)}.0/24",
            **environment,
        }
        self.http, self.https = f"http://127.0.0.1:{http}", f"https://localhost:{https}"

    def compose(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `docker compose` for this project; a .env of the checkout gives no values here."""
        files = [word for file in self.files for word in ("-f", file)]
        command = ("docker", "compose", "--env-file", os.devnull, "-p", self.project, *files, *words)
        return run(*command, check=check, environment=self.environment)

    def up(self, *words: str) -> None:
        """Start what does not run and wait until all of it is healthy."""
        self.compose("up", "-d", "--wait", "--wait-timeout", "180", *words)

    def down(self) -> None:
        """Stop it and remove its data."""
        self.compose("down", "-v", "--remove-orphans", "-t", "5", check=False)

    def containers(self, service: str | None = None) -> list[dict[str, Any]]:
        """What `docker compose ps` knows of them."""
        lines = self.compose("ps", "--format", "json", *([service] if service else [])).stdout.splitlines()
        return [json.loads(line) for line in lines]

    def inspect(self) -> str:
        """All that the engine tells of the project's containers."""
        return run("docker", "inspect", *(container["ID"] for container in self.containers())).stdout

    def access_log(self) -> list[dict[str, Any]]:
        """The lines of nginx's access log; each one must be JSON."""
        lines = self.compose("logs", "--no-log-prefix", "nginx").stdout.splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


def submit(client: httpx.Client | httpx.AsyncClient, iterations: int = 10) -> Any:
    """Post a task: a response, or with an asynchronous client the promise of one."""
    return client.post("/api/async/process", json={"data": "some text", "iterations": iterations})


def final_status(client: httpx.Client, task_id: str) -> dict[str, Any] | None:
    """The task's document if it is final."""
    response = client.get(f"/api/async/status/{task_id}")
    if response.status_code == 429:
        time.sleep(int(response.headers["Retry-After"]))
        return None
    document = response.raise_for_status().json()
    return document if document["status"] in {"SUCCESS", "FAILURE", "CANCELLED"} else None
