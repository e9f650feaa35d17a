"""What the stack is doing: the table of `make status` and the lines of `make logs`."""

import os
import time
from collections.abc import Iterable
from contextlib import ExitStack, closing
from pathlib import Path

import psutil

from app.settings import Settings
from deploy.native.commands import running_or_raise
from deploy.native.converge import is_well
from deploy.native.layout import Layout, StackError
from deploy.native.output import Output
from deploy.native.plan import Plan
from deploy.native.servers import find_tools
from deploy.native.service import Service, kind_of
from deploy.native.supervision import UP, Process, Supervisor

POLL_SECONDS = 0.3
MINUTE, HOUR, DAY = 60, 3600, 86_400
ALIASES = {"worker": {"heavy", "light"}, "mongodb": {"database"}}
ROW = "{:<10} {:<10} {:>8} {:>9} {:>9}  {}"


def status(settings: Settings, output: Output) -> bool:
    """Print a line a process and return whether all are well. Raises StackError if the stack does not run."""
    layout = Layout.of(settings)
    state = running_or_raise(layout)
    known = Supervisor(layout).processes()
    services = Plan(state.restored(), layout, find_tools(), state.digests, state.scaled).services()
    output.say(ROW.format("SERVICE", "STATE", "PID", "UPTIME", "MEMORY", "ADDRESS").rstrip())
    states = [row(service, known.get(service.name), output) for service in services]
    return all(state == "healthy" for state in states)


def row(service: Service, process: Process | None, output: Output) -> str:
    """Print the line of one process and return its state."""
    if process is None or process.state not in UP:
        state = "stopped" if process is None else {"BACKOFF": "crashing"}.get(process.state, process.state.lower())
        output.say(ROW.format(service.name, state, "-", "-", "-", service.address).rstrip())
        return state
    state = "healthy" if is_well(service, process) else "unhealthy"
    uptime = duration(time.time() - process.started)
    output.say(ROW.format(service.name, state, process.pid, uptime, memory(process.pid), service.address).rstrip())
    return state


def duration(seconds: float) -> str:
    """Return a time span with its two largest units."""
    whole = max(0, int(seconds))
    for size, unit, smaller, name in ((DAY, "d", HOUR, "h"), (HOUR, "h", MINUTE, "min"), (MINUTE, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // smaller}{name}"
    return f"{whole}s"


def memory(pid: int) -> str:
    """Return the resident memory of a process and its children."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.Error:
        if not total:
            return "-"
    return f"{total / 1_048_576:.0f} MiB"


def logs(settings: Settings, what: str | None, output: Output, *, lines: int = 10, follow: bool = True) -> None:
    """Print the last lines of the logs, of all or of one kind or process, then each new one. Raises StackError."""
    layout = Layout.of(settings)
    files = {path.stem: path for path in sorted(layout.logs.glob("*.log"))}
    chosen = {name: path for name, path in files.items() if selected(name, what)}
    if not chosen:
        there = ", ".join(sorted({kind_of(name) for name in files}))
        raise StackError(
            f"no log of {what}: there are {there}" if there else "there are no logs yet: `make run` starts the stack"
        )
    if follow and not Supervisor(layout).running():
        output.say("The stack does not run; these are the last lines of when it did.")
        follow = False
    width = max(map(len, chosen))
    with ExitStack() as stack:
        tails = [stack.enter_context(closing(Tail(name, path, lines))) for name, path in chosen.items()]
        while True:
            new = [f"{tail.name:<{width}} | {line}" for tail in tails for line in tail.read()]
            for line in new:
                output.say(line)
            if not follow:
                return
            if not new:
                output.check_reader()
                time.sleep(POLL_SECONDS)


def selected(name: str, what: str | None) -> bool:
    """Tell whether a log is meant by a name, a kind or a word for several kinds."""
    return what is None or name == what or kind_of(name) in ALIASES.get(what, {what})


class Tail:
    """The end of a log that grows and is moved away when it is full."""

    def __init__(self, name: str, path: Path, lines: int) -> None:
        self.name, self.path = name, path
        self.file = path.open("rb")
        last = self.file.read().splitlines(keepends=True)[-lines:]
        self.file.seek(-sum(map(len, last)), 2)
        self.rest = b""

    def read(self) -> Iterable[str]:
        """Return the complete lines written since the last call."""
        text = self.file.read()
        if not text and self.moved():
            self.file.close()
            self.file = self.path.open("rb")
            text = self.file.read()
        *whole, self.rest = (self.rest + text).split(b"\n")
        return [line.decode(errors="replace") for line in whole]

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def moved(self) -> bool:
        """Tell whether the log was rotated: its name is another file's now."""
        try:
            return not os.path.samestat(self.path.stat(), os.fstat(self.file.fileno()))
        except OSError:
            return False
