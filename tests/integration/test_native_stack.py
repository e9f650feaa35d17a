"""`make run` and its companions, against a stack of their own."""

import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.settings import Settings
from deploy.native import commands, processes, servers
from deploy.native.layout import StackError
from deploy.native.output import Output
from deploy.native.ports import free_ports
from deploy.native.supervision import Supervisor
from tests.integration.harness import Stack, wait_until

pytestmark = pytest.mark.integration


def new_stack(directory: Path) -> Stack:
    stack = Stack(directory)
    stack.environment["RABBITMQ_PROMETHEUS_PORT"] = str(free_ports(1)[0])
    return stack


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = new_stack(tmp_path_factory.mktemp("native") / "a stack")
    started = stack.run("up", check=False)
    assert started.returncode == 0, started.stderr
    assert "task 100%" in started.stdout
    assert '"total_processed": 2000' in started.stdout
    yield stack
    stack.run("clean")


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Stack]:
    """A second one, not started."""
    stack = new_stack(tmp_path / "other")
    yield stack
    stack.run("clean")


def pids(stack: Stack) -> dict[str, int]:
    return {name: process.pid for name, process in Supervisor(stack.layout).processes().items()}


def refused(stack: Stack, *words: str, **environment: str) -> str:
    """The one line of a command that fails, without the word it begins with."""
    done = stack.run(*words, check=False, **environment)
    assert done.returncode == 1
    line, *details = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(detail.startswith("    ") for detail in details)
    return line.removeprefix("error: ")


def test_status_shows_every_process_as_healthy(stack):
    lines = stack.run("status").stdout.splitlines()[1:]
    assert {line.split()[0] for line in lines} == set(pids(stack))
    assert len(lines) == 14
    assert {line.split()[1] for line in lines} == {"healthy"}


def test_a_second_run_is_quick_and_changes_nothing(stack):
    before, begun = pids(stack), time.monotonic()
    assert "14 processes run already" in stack.run("up").stdout
    assert time.monotonic() - begun < 10
    assert pids(stack) == before


def test_scaling_adds_and_removes_single_processes_and_holds_over_a_run(stack):
    before = pids(stack)
    stack.run("scale", "api=3", "worker=2")
    scaled = pids(stack)
    assert set(scaled) - set(before) == {"api-3", "heavy-2"}
    assert before.items() <= scaled.items()
    third = stack.replicas[1].rpartition(":")[2]
    third = f"127.0.0.1:{int(third) + 1}"
    wait_until(lambda: httpx.get(f"{stack.url}/api/items").is_success and third in stack.log("nginx"))

    stack.run("up")
    assert pids(stack) == scaled

    stack.run("scale", "api=2", "worker=1")
    assert pids(stack) == before
    assert all(httpx.get(f"{stack.url}/health").is_success for _ in range(20))


def test_a_rolling_restart_replaces_what_is_ours_and_no_server(stack):
    before = pids(stack)
    lines = stack.run("restart-rolling").stdout.splitlines()
    after = pids(stack)
    ours = ["api-1", "api-2", "heavy-1", "light-1", "beat", "events-1", "outside", "service1", "service2"]
    assert {name for name in before if before[name] != after[name]} == set(ours)
    assert [line.split()[1] for line in lines if line.startswith("  ok ")] == ours
    assert stack.settled()
    assert "14 processes run already" in stack.run("up").stdout


def test_a_rolling_restart_waits_for_nobody_that_is_not_well(stack):
    supervisor = Supervisor(stack.layout)
    supervisor.stop(["api-2"])
    try:
        before = pids(stack)
        assert refused(stack, "restart-rolling").startswith("api-2 not well: nothing is restarted")
        assert pids(stack) == before
    finally:
        supervisor.start("api-2")
        wait_until(stack.settled)


def test_what_cannot_be_scaled_is_refused(stack):
    assert refused(stack, "scale", "redis=2") == "redis cannot be scaled: api, worker, beat can"
    assert refused(stack, "scale", "api=0") == "api=0: 1 to 50 can run"


def test_logs_are_those_asked_for(stack):
    lines = stack.run("logs", "api", "--no-follow", "--lines", "2").stdout.splitlines()
    assert {line.split(" | ")[0] for line in lines} >= {"api-1", "api-2"}
    assert all(line.startswith("api-") for line in lines)
    assert "no log of nothing: there are api, beat" in refused(stack, "logs", "nothing", "--no-follow")


def test_killed_processes_come_back(stack):
    killed = {name: pids(stack)[name] for name in ("api-1", "heavy-1", "nginx")}
    for pid in killed.values():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not killed.items() & pids(stack).items() and stack.settled())
    started = pids(stack).values()
    ours = {process.pid: process for process in processes.of_stack(stack.layout.root, "nginx")}
    assert all(one.ppid() in started for pid, one in ours.items() if pid not in started), "workers of the killed nginx"


def test_a_taken_port_is_refused_before_anything_starts(stack, other):
    port = stack.url.rpartition(":")[2]
    line = refused(other, "up", NGINX_PORT=port)
    assert line.startswith(f"port {port} of nginx is taken by nginx (process ")
    assert "NGINX_PORT=" in line
    assert not other.layout.supervisord_pid.exists()
    assert not processes.of_stack(other.layout.root)


def test_a_change_that_fails_leaves_a_running_stack_as_it_was(stack):
    before = pids(stack)
    port = int(stack.environment["API_PORT"]) + 2
    with socket.create_server(("127.0.0.1", port)):
        assert refused(stack, "scale", "api=3").startswith(f"port {port} of api-3 is taken")
    assert "nginx refuses its configuration" in refused(stack, "up", NGINX_BODY_MAX="much")
    assert pids(stack) == before
    assert stack.settled()


@pytest.fixture
def broken_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    templates = tmp_path / "templates"
    shutil.copytree(servers.TEMPLATES, templates)
    with (templates / "redis.conf.template").open("a") as template:
        template.write("appendfoo yes\n")
    monkeypatch.setattr(servers, "TEMPLATES", templates)


def settings_of(stack: Stack) -> Settings:
    return Settings(**{name.lower(): value for name, value in stack.environment.items()})


@pytest.mark.usefixtures("broken_redis")
def test_a_broken_server_is_named_and_nothing_is_left(other):
    with pytest.raises(StackError, match="redis did not start") as error:
        commands.up(settings_of(other), Output())
    assert any("appendfoo" in line for line in error.value.details)
    assert not processes.of_stack(other.layout.root)


@pytest.mark.usefixtures("broken_redis")
def test_a_server_that_breaks_by_a_change_runs_again_as_it_was(stack):
    before = pids(stack)
    with pytest.raises(StackError, match="redis did not start"):
        commands.up(settings_of(stack), Output())
    wait_until(stack.settled)
    after = pids(stack)
    assert {name for name in before if before[name] != after[name]} == {"redis"}


def test_a_killed_supervisor_is_replaced_and_nothing_is_lost(stack):
    item = httpx.post(f"{stack.url}/api/items", json={"name": "kept"}).raise_for_status()
    before = pids(stack)
    os.kill(int(stack.layout.supervisord_pid.read_text()), signal.SIGKILL)
    assert "is not running" in refused(stack, "status")
    stack.run("up", "--no-demo")
    assert not before.items() & pids(stack).items()
    assert stack.settled()
    assert httpx.get(f"{stack.url}{item.headers['location']}").json()["name"] == "kept"


def test_down_leaves_data_and_no_process(stack):
    stack.run("down")
    assert not processes.of_stack(stack.layout.root)
    assert (stack.layout.data("redis") / "appendonlydir").exists()
    assert "is not running" in refused(stack, "status")
    assert stack.run("down").stdout.strip() == "nothing was running"
    stack.run("clean")
    assert not stack.layout.root.exists()
