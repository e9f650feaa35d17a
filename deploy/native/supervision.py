"""Speak to the stack's supervisord."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from xmlrpc.client import Fault, ServerProxy

from supervisor.xmlrpc import SupervisorTransport

from deploy.native.layout import ROOT, Layout, StackError
from deploy.native.processes import STACK

DOWN = frozenset({"STOPPED", "EXITED", "FATAL", "UNKNOWN"})
UP = frozenset({"STARTING", "RUNNING"})
LAUNCH_SECONDS = 15
NOT_RUNNING, BAD_NAME, ALREADY_STARTED = 70, 10, 60  # supervisor.xmlrpc.Faults


@dataclass(frozen=True)
class Process:
    """What supervisord knows of a process."""

    name: str
    state: str
    pid: int
    started: float


@dataclass(frozen=True)
class Changes:
    """How the configuration differs from what runs."""

    added: frozenset[str] = frozenset()
    changed: frozenset[str] = frozenset()
    removed: frozenset[str] = frozenset()


class Supervisor:
    """The supervisord of one stack, running or not."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def call(self, method: str, *arguments: object) -> Any:
        """Call a method of its XML-RPC interface. Raises OSError if it does not run, Fault if it refuses."""
        transport = SupervisorTransport(None, None, f"unix://{self.layout.socket}")
        proxy = ServerProxy("http://127.0.0.1", transport=transport)
        try:
            return getattr(proxy.supervisor, method)(*arguments)
        except HTTPException as error:
            raise ConnectionError(str(error)) from error
        finally:
            transport.close()

    def running(self) -> bool:
        """Tell whether it answers."""
        try:
            return bool(self.call("getState")["statename"] == "RUNNING")
        except OSError:
            return False

    def launch(self) -> None:
        """Start it, detached from this terminal. Raises StackError if it does not come up."""
        environment = {"PATH": os.defpath, STACK: str(self.layout.root)}
        command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(self.layout.supervisord_conf)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        deadline = time.monotonic() + LAUNCH_SECONDS
        while done.returncode == 0 and time.monotonic() < deadline:
            if self.running():
                return
            time.sleep(0.05)
        said = (done.stdout + done.stderr).strip().splitlines()
        raise StackError(f"supervisord did not start. Its log: {self.layout.log('supervisord')}", *said[-5:])

    def processes(self) -> dict[str, Process]:
        """Return all processes by name."""
        found = self.call("getAllProcessInfo")
        return {one["name"]: Process(one["name"], one["statename"], one["pid"], one["start"]) for one in found}

    def reread(self) -> Changes:
        """Read its configuration again and say what differs; nothing is started or stopped yet."""
        (found,) = self.call("reloadConfig")
        return Changes(*map(frozenset, found))

    def start(self, name: str) -> None:
        """Start a process, do not wait for it."""
        self.tolerating({ALREADY_STARTED}, "startProcess", name, False)  # noqa: FBT003

    def stop(self, names: list[str]) -> None:
        """Stop processes side by side, each with its own grace period, and wait until they have ended."""
        for name in names:
            self.tolerating({NOT_RUNNING, BAD_NAME}, "stopProcess", name, False)  # noqa: FBT003
        while any(one.name in names and one.state not in DOWN for one in self.processes().values()):
            time.sleep(0.1)

    def replace(self, names: list[str]) -> None:
        """Stop processes and take over their new configuration."""
        self.remove(names)
        for name in names:
            self.call("addProcessGroup", name)

    def remove(self, names: list[str]) -> None:
        """Stop processes and forget them."""
        self.stop(names)
        for name in names:
            self.tolerating({BAD_NAME}, "removeProcessGroup", name)

    def add(self, name: str) -> None:
        """Take up a process that is new in the configuration."""
        self.call("addProcessGroup", name)

    def signal(self, name: str, signal: str) -> None:
        """Send a signal."""
        self.call("signalProcess", name, signal)

    def tolerating(self, codes: set[int], method: str, *arguments: object) -> None:
        """Call a method whose refusal for one of these reasons means that nothing is left to do."""
        try:
            self.call(method, *arguments)
        except Fault as fault:
            if fault.faultCode not in codes:
                raise

    def shutdown(self, seconds: float = 15) -> None:
        """End it once its processes have ended."""
        try:
            self.call("shutdown")
        except (OSError, Fault):
            return
        deadline = time.monotonic() + seconds
        while self.layout.supervisord_pid.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
