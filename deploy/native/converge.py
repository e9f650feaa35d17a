"""Make what runs into what is planned, in order, watching each process come up; on failure undo it all."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from xmlrpc.client import Fault

from deploy.native import ports, processes
from deploy.native.configuration import all_files
from deploy.native.layout import Layout, StackError, write_private
from deploy.native.output import Output
from deploy.native.service import BACKENDS, Service
from deploy.native.supervision import UP, Changes, Process, Supervisor
from deploy.native.teardown import stop_everything, uninterrupted

POLL_SECONDS = 0.1
STARTS_ALLOWED = 2  # a third start within one wait, or the prospect of one: it keeps ending
LOG_LINES = 5
OURS = frozenset({"api", "heavy", "light", "beat", "events"})  # what a rolling restart restarts
OURS = frozenset({"api", "heavy", "light", "beat", "events", *BACKENDS})  # what a rolling restart restarts


@contextmanager
def converging(layout: Layout, services: list[Service], output: Output) -> Iterator[list[str]]:
    """Bring the services up and yield the names of those started; undo it if that or the body fails.

    Raises StackError.
    """
    ports.check(services, {process.pid for process in processes.of_stack(layout.root)})
    convergence = Convergence(layout, services, output)
    try:
        convergence.run()
        yield convergence.started
    except BaseException:
        with uninterrupted(), output.waiting("stopping what was started"):
            convergence.undo()
        raise


class Convergence:
    """One run of it."""

    def __init__(self, layout: Layout, services: list[Service], output: Output) -> None:
        self.layout, self.services, self.output = layout, services, output
        self.supervisor = Supervisor(layout)
        self.fresh = not self.supervisor.running()
        self.changes = Changes()
        self.files = all_files(layout, services, sys.executable)
        self.earlier = {path: path.read_text() if path.exists() else None for path in self.files}
        self.log_ends: dict[str, int] = {}  # where this run's part of a log begins
        self.started: list[str] = []

    def run(self) -> None:
        """Write the configuration, start what is to run, stop what is not."""
        write(self.files, self.layout, self.services)
        for service in self.services:
            check_configuration(service)
        if self.fresh:
            self.supervisor.launch()
        else:
            self.changes = self.supervisor.reread()
        for _, stage in groupby(self.services, key=lambda service: service.stage):
            for batch in self.batches(list(stage)):
                self.start(batch)
                self.wait(batch)
        self.remove(sorted(self.changes.removed))
        if others := len(self.services) - len(self.started):
            self.output.say(f"  {others} processes run already")

    def remove(self, names: list[str]) -> None:
        """Stop what is planned no longer; nginx has left it alone by now."""
        if names:
            with self.output.waiting(f"stopping {', '.join(names)}"):
                self.supervisor.remove(names)
            self.output.say(f"  stopped {', '.join(names)}")
        for name in names:
            (self.layout.programs / name).unlink(missing_ok=True)

    def batches(self, stage: list[Service]) -> list[list[Service]]:
        """Return what is started together: all at once, but replicas that change one after the other."""
        rolling = [one for one in stage if one.kind == "api" and one.name in self.changes.changed]
        together = [one for one in stage if one not in rolling]
        return [batch for batch in (together, *([one] for one in rolling)) if batch]

    def start(self, batch: list[Service]) -> None:
        """Start those that do not run as they should."""
        running = self.supervisor.processes()
        changed = [one.name for one in batch if one.name in self.changes.changed]
        self.supervisor.replace(changed)
        for service in batch:
            name = service.name
            if name in self.changes.added:
                self.supervisor.add(name)
            elif name not in changed and running[name].state in UP:
                self.reload(service)
                continue
            else:
                self.supervisor.stop([name])  # from waiting to be restarted, or from stopping
            self.launch(name)

    def launch(self, name: str) -> None:
        """Start a process that is down."""
        log = self.layout.log(name)
        self.log_ends[name] = log.stat().st_size if log.exists() else 0
        self.layout.alive(name).unlink(missing_ok=True)
        self.started.append(name)
        self.supervisor.start(name)

    def roll(self) -> None:
        """Restart what runs our code, each once the one before is well.

        Nginx stays, and reads its configuration again only if that has changed: a reload closes idle connections of
        clients, some of which are about to use them. Raises StackError for the first that does not come up; the others
        then run on as they are.
        """
        write(self.files, self.layout, self.services)
        self.changes = self.supervisor.reread()
        for service in self.services:
            if service.kind in OURS:
                if service.name in self.changes.changed:
                    self.supervisor.replace([service.name])
                else:
                    self.supervisor.stop([service.name])
                self.launch(service.name)
                self.wait([service])
            else:
                self.reload(service)

    def reload(self, service: Service) -> None:
        """Have a running server read a configuration that has changed."""
        if service.rereads and any(self.earlier[path] != text for path, text in service.files.items()):
            reload(self.supervisor, service.name)

    def wait(self, batch: list[Service]) -> None:
        """Wait until all are well. Raises StackError for the first that is not in time or keeps ending."""
        begun = time.monotonic()
        pending = {service.name: service for service in batch}
        starts: dict[str, set[float]] = {name: set() for name in pending}
        with self.output.waiting("") as status:
            while pending:
                seconds = time.monotonic() - begun
                status.update(f"waiting for {', '.join(pending)}")
                known = self.supervisor.processes()
                for name, service in list(pending.items()):
                    process = known[name]
                    starts[name].add(process.started)
                    if is_well(service, process):
                        if name in self.started:
                            self.output.done(name, f"{seconds:5.1f} s")
                        del pending[name]
                    elif len(starts[name]) > STARTS_ALLOWED - (process.state == "BACKOFF"):
                        raise self.failure(service, "it keeps ending")
                    elif seconds > service.start_seconds:
                        raise self.failure(service, f"it is not well after {service.start_seconds} s")
                time.sleep(POLL_SECONDS)

    def failure(self, service: Service, reason: str) -> StackError:
        """Return the error of a process that does not come up, with what it said last."""
        log = self.layout.log(service.name)
        said = log_since(log, self.log_ends.get(service.name, 0))
        complaints = [line for line in said if service.complaint in line][:LOG_LINES] if service.complaint else []
        return StackError(f"{service.name} did not start: {reason}. Its log: {log}", *(complaints or said[-LOG_LINES:]))

    def undo(self) -> None:
        """Stop what was started; a stack that ran before runs on as it was."""
        if self.fresh:
            stop_everything(self.layout, self.output)
            return
        for path, text in self.earlier.items():
            if text is None:
                path.unlink(missing_ok=True)
            else:
                write_private(path, text)
        with suppress(OSError, Fault):
            back = self.supervisor.reread()
            self.supervisor.stop([name for name in self.started if name not in back.changed])
            self.supervisor.remove(sorted(back.removed))
            self.supervisor.replace(sorted(back.changed))
            for name in back.changed:
                self.supervisor.start(name)
            for service in self.services:
                if service.rereads and service.name not in self.started:
                    reload(self.supervisor, service.name)


def is_well(service: Service, process: Process) -> bool:
    """Tell whether a process runs and answers."""
    return process.state in UP and service.is_well(process.started)


def check_configuration(service: Service) -> None:
    """Raise StackError if nginx refuses its configuration: better seen before anything starts than after."""
    if not service.rereads:
        return
    command = [*service.command, "-t"]
    test = subprocess.run(command, cwd=service.directory, capture_output=True, text=True, check=False)
    if test.returncode:
        found = re.search(r"\[emerg\] (?:\d+#\d+: )?(.*)", test.stderr)
        raise StackError(f"nginx refuses its configuration: {found[1] if found else test.stderr.strip()}")


def reload(supervisor: Supervisor, name: str) -> None:
    """Have nginx read its configuration again and wait until workers with the new one have taken over."""
    master = supervisor.processes()[name].pid
    before = processes.children(master)
    supervisor.signal(name, "HUP")
    deadline = time.monotonic() + 5
    while not processes.children(master) - before and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def write(files: dict[Path, str], layout: Layout, services: list[Service]) -> None:
    """Write the configuration and make the directories it speaks of."""
    for service in services:
        service.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in service.files:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    (layout.root / "nginx" / "temp").mkdir(mode=0o700, parents=True, exist_ok=True)
    for path, text in files.items():
        write_private(path, text)


def log_since(log: Path, begin: int) -> list[str]:
    """Return the lines that say something from this offset on; all if the log is shorter by now."""
    try:
        text = log.read_bytes()
    except OSError:
        return []
    part = text[begin:] if len(text) >= begin else text
    return [line for line in part.decode(errors="replace").splitlines() if line.strip()]
