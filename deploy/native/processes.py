"""Find and end processes of a stack, also those that supervisord no longer knows of.

Run as `python -m deploy.native.processes nginx` by nginx's own script, before it starts: the workers of a killed nginx
keep its port. (The children of a killed Celery worker end with it: it asks the kernel for that.)
"""

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

STACK = "NATIVE_STACK"  # in the environment of every process of a stack: its directory
# These write their titles over their environment: they are known by their working directory.
RENAMED = frozenset({"nginx"})


def of_stack(stack: Path, name: str | None = None) -> list[psutil.Process]:
    """Return the running processes of the stack in this directory, or those of one program.

    They are there to be ended: never this process, nor one that it was started by.
    """
    spared = {1, os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid not in spared and name in {None, process.name()} and belongs(process, stack):
                found.append(process)
        except psutil.Error:
            continue  # it has ended, or is another user's
    return found


def belongs(process: psutil.Process, stack: Path) -> bool:
    """Tell whether a process was started for this stack. Raises psutil.Error if it cannot be read."""
    if elsewhere(process.pid):
        return False
    if process.name() in RENAMED:
        return Path(process.cwd()).is_relative_to(stack)
    return process.environ().get(STACK) == str(stack)


def elsewhere(pid: int) -> bool:
    """Tell whether a process runs in a container: root sees those too, and a path there may be the same as here."""
    try:
        return Path(f"/proc/{pid}/ns/pid").readlink() != Path("/proc/self/ns/pid").readlink()
    except OSError:
        return False


def end(processes: Iterable[psutil.Process], grace: float) -> list[psutil.Process]:
    """Ask processes to end, kill those that have not after `grace` seconds, return those that are still there."""
    processes = list(processes)
    for process in processes:
        try:
            process.terminate()
        except psutil.Error:
            continue
    alive = wait(processes, grace)
    for process in alive:
        try:
            process.kill()
        except psutil.Error:
            continue
    return wait(alive, 5)


def wait(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait for processes to end, return those that have not.

    A zombie has: where nobody reaps it (a container whose first process is no init) it stays one.
    """
    deadline = time.monotonic() + seconds
    while (alive := [process for process in processes if runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive


def runs(process: psutil.Process) -> bool:
    """Tell whether a process has not ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def children(pid: int) -> set[int]:
    """Return the processes a process has started that still run."""
    try:
        return {child.pid for child in psutil.Process(pid).children()}
    except psutil.Error:
        return set()


if __name__ == "__main__":
    left = of_stack(Path(os.environ[STACK]), sys.argv[1])
    if left:
        print(f"ending {len(left)} processes that an earlier {sys.argv[1]} has left", flush=True)
        end(left, grace=1)
