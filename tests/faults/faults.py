"""The faults, by name: each a function that applies it to a running stack and returns when it is over."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from app.context import open_context
from app.settings import Settings
from deploy.native import commands
from deploy.native.layout import State
from deploy.native.output import Output
from deploy.native.plan import Plan
from deploy.native.servers import find_tools
from deploy.native.service import Service
from deploy.native.supervision import Supervisor
from tests.integration.harness import ROOT, Stack, paused, start, wait_until

FAKETIME = (
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
)
DAY = 86_400
PROCESSES = (
    "redis", "rabbitmq", "database", "api-1", "api-2", "heavy-1", "heavy-2", "light-1", "beat", "beat-2", "nginx",
)  # fmt: skip


class SkippedError(Exception):
    """A fault that cannot be had on this machine; the message says why."""


@dataclass
class Scene:
    """What a fault is applied to, and what it leaves for the reckoning."""

    stack: Stack
    factor: float = 1.0  # of how long and how much
    over_at: float = 0.0  # when the stack could begin to heal (monotonic)
    poison: list[str] = field(default_factory=list)  # tasks that must end in FAILURE
    wrong: list[tuple[str, str]] = field(default_factory=list)  # what must not be answered, and to what
    requests: int = 0  # that the fault itself made

    def over(self) -> None:
        """Healing counts from now."""
        self.over_at = time.monotonic()


@dataclass(frozen=True)
class Fault:
    """One row of the table."""

    name: str
    apply: Callable[[Scene], None]
    cuts_clients: bool = False  # connections of clients may break: nginx itself is hit
    forgets: bool = False  # Redis loses what it holds: results that were not archived are gone
    flawless: bool = False  # no request may fail


def service(stack: Stack, name: str) -> Service:
    """A process of the stack as it was planned."""
    state = State.load(stack.layout)
    assert state is not None
    plan = Plan(state.restored(), stack.layout, find_tools(), state.digests, state.scaled)
    return next(one for one in plan.services() if one.name == name)


def leader(stack: Stack) -> str:
    """The beat that leads: the one whose log said so last."""
    names = [path.stem for path in stack.layout.logs.glob("beat*.log")]
    said = {
        name: max((line for line in stack.log(name).splitlines() if '"leading"' in line), key=_time, default="")
        for name in names
    }
    return max(said, key=lambda name: _time(said[name]))


def _time(line: str) -> str:
    return line.partition('"timestamp": "')[2][:26]


def kill(*names: str) -> Callable[[Scene], None]:
    """SIGKILL to all processes of each service; returns once the supervisor has seen it."""

    def apply(scene: Scene) -> None:
        chosen = [leader(scene.stack) if name == "leader" else name for name in names]
        before = {name: scene.stack.pid(name) for name in chosen}
        victims = [process for name in chosen for process in scene.stack.processes(name)]
        for process in victims:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        scene.over()
        wait_until(lambda: all(scene.stack.pid(name) != before[name] for name in chosen))

    return apply


def stop(name: str, seconds: float, times: int = 1) -> Callable[[Scene], None]:
    """Stop a service, `times` times, with two seconds between."""

    def apply(scene: Scene) -> None:
        for number in range(times):
            if number:
                time.sleep(2)
            with paused(scene.stack, leader(scene.stack) if name == "leader" else name):
                time.sleep(seconds)
        scene.over()

    return apply


def empty_redis(scene: Scene) -> None:
    """Redis comes back without anything."""
    supervisor = Supervisor(scene.stack.layout)
    supervisor.stop(["redis"])
    shutil.rmtree(scene.stack.layout.data("redis") / "appendonlydir")
    supervisor.start("redis")
    scene.over()


def restart_broker(scene: Scene) -> None:
    """RabbitMQ is shut down as one does, and started three seconds later."""
    supervisor = Supervisor(scene.stack.layout)
    supervisor.stop(["rabbitmq"])
    time.sleep(3)
    supervisor.start("rabbitmq")
    scene.over()


def fill_disk(scene: Scene) -> None:
    """RabbitMQ's disk alarm: it takes nothing from publishers, for eight seconds."""
    broker = service(scene.stack, "rabbitmq")
    program = shutil.which("rabbitmqctl", path=str(Path(broker.command[0]).parent))
    assert program

    def limit(text: str) -> None:
        subprocess.run(
            [program, "set_disk_free_limit", text],
            env=dict(broker.environment),
            check=True,
            capture_output=True,
            timeout=60,
        )

    limit("900000GB")
    try:
        time.sleep(8)
    finally:
        limit("256MB")
    scene.over()


def cut_off_worker(scene: Scene) -> None:
    """A worker hangs, the broker closes its connections and gives its tasks to others; then it goes on."""
    stack = scene.stack
    ports = {
        connection.laddr.port
        for process in stack.processes("heavy-1")
        for connection in process.net_connections("tcp")
        if connection.raddr and connection.raddr.port == service(stack, "rabbitmq").ports["RABBITMQ_PORT"]
    }
    with httpx.Client(base_url=stack.management, auth=("guest", "guest"), timeout=10) as management:

        def names() -> list[str]:
            # The page of connections is made anew every few seconds.
            return [row["name"] for row in management.get("/api/connections").json() if row.get("peer_port") in ports]

        found = wait_until(names)
        with paused(stack, "heavy-1"):
            for name in found:
                management.delete(f"/api/connections/{name}").raise_for_status()
            time.sleep(6)
    scene.over()


def jump_clock(scene: Scene) -> None:
    """A worker's clock (not the machine's) jumps a day ahead, then a day back behind the true time."""
    library = os.environ.get("LIBFAKETIME") or next((path for path in FAKETIME if Path(path).exists()), None)
    if library is None:
        raise SkippedError("needs libfaketime (`apt install libfaketime`, or its path in LIBFAKETIME)")
    stack = scene.stack
    supervisor, script, clock = Supervisor(stack.layout), stack.layout.programs / "heavy-1", stack.layout.root / "clock"
    original = script.read_text()

    def restart(text: str) -> None:
        script.write_text(text)
        supervisor.stop(["heavy-1"])
        stack.layout.alive("heavy-1").unlink(missing_ok=True)
        supervisor.start("heavy-1")
        wait_until(stack.layout.alive("heavy-1").exists, 60)

    clock.write_text("+0")
    faked = f"export LD_PRELOAD={library} FAKETIME_TIMESTAMP_FILE={clock} FAKETIME_NO_CACHE=1 DONT_FAKE_MONOTONIC=1\n"
    try:
        restart(original.replace("exec ", faked + "exec ", 1))
        for offset in (DAY, -DAY):
            clock.write_text(f"{offset:+d}")
            time.sleep(4)
    finally:
        restart(original)
    scene.over()


def poison(scene: Scene) -> None:
    """Tasks that kill the process that runs them."""

    async def submit() -> None:
        async with open_context(scene.stack.settings, service="test") as context:
            for _ in range(3):
                scene.poison.append(await start(context, "test.poison", "heavy", {"failures": 99}))

    asyncio.run(submit())
    scene.over()
    time.sleep(5)


def malform(scene: Scene) -> None:
    """10,000 requests that are not as they should be."""
    # A process of its own: it would keep the load from being steady.
    scene.requests = int(10_000 * scene.factor)
    command = [sys.executable, "-m", "tests.faults.malformed", scene.stack.url, scene.stack.replicas[0]]
    done = subprocess.run(
        [*command, str(scene.requests)], cwd=ROOT, capture_output=True, text=True, timeout=600, check=True
    )
    scene.wrong = json.loads(done.stdout)
    scene.over()


def roll(scene: Scene) -> None:
    """`make restart-rolling`."""
    commands.restart_rolling(Settings(_env_file=None, stack_dir=scene.stack.layout.root), Output())
    scene.over()


def nothing(scene: Scene) -> None:
    """The load alone, to compare with."""
    time.sleep(5)
    scene.over()


STOP = 8  # seconds: past MONGODB_TIMEOUT and REDIS_TIMEOUT
FAULTS = {
    fault.name: fault
    for fault in (
        Fault("no fault", nothing, flawless=True),
        Fault("kill -9 an api replica", kill("api-1")),
        Fault("kill -9 a heavy worker", kill("heavy-1")),
        Fault("kill -9 the light worker", kill("light-1")),
        Fault("kill -9 the beat that leads", kill("leader")),
        Fault("kill -9 redis", kill("redis")),
        Fault("kill -9 rabbitmq", kill("rabbitmq")),
        Fault("kill -9 the database", kill("database")),
        Fault("kill -9 nginx", kill("nginx"), cuts_clients=True),
        Fault("kill -9 all but nginx", kill(*(name for name in PROCESSES if name != "nginx"))),
        Fault("an api replica stops 8 s", stop("api-1", STOP)),
        Fault("an api replica stops 20 s", stop("api-1", 20)),  # past nginx's patience
        Fault("a heavy worker stops 8 s", stop("heavy-1", STOP)),
        Fault("a heavy worker is cut off", cut_off_worker),
        Fault("the light worker stops 8 s", stop("light-1", STOP)),
        Fault("the beat that leads stops 12 s", stop("leader", 12)),  # past its lease
        Fault("redis stops 8 s", stop("redis", STOP)),
        Fault("rabbitmq stops 8 s", stop("rabbitmq", STOP)),
        Fault("the database stops 8 s", stop("database", STOP)),
        Fault("nginx stops 6 s", stop("nginx", 6)),
        Fault("redis restarts empty", empty_redis, forgets=True),
        Fault("rabbitmq restarts", restart_broker),
        Fault("rabbitmq's disk is full", fill_disk),
        Fault("a slow database", stop("database", 5, times=3)),
        Fault("a worker's clock jumps", jump_clock),
        Fault("poison tasks", poison),
        Fault("malformed requests", malform),
        Fault("a rolling restart", roll, flawless=True),
    )
}  # fmt: skip
