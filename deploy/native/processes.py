"""Find and end processes of a stack, also those that supervisord no longer knows of.

Run as `python -m deploy.native.processes nginx` by nginx's own script, before it starts: the workers of a killed nginx
keep its port. (The children of a killed Celery worker end with it: it asks the kernel for that.)
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil

STACK = "NATIVE_STACK"  # in the environment of every process of a stack: its directory
# These write their titles over their environment: they are known by their working directory.
RENAMED = frozenset({"nginx"})


def of_stack(stack: Path, name: str | None = None) -> list[psutil.Process]:
    """Return the running processes of the stack in this directory, or those of one program."""
    found = []
    for process in psutil.process_iter():
        try:
            if name in {None, process.name()} and belongs(process, stack):
                found.append(process)
        except psutil.Error:
            continue  # it has ended, or is another user's
    return found


def belongs(process: psutil.Process, stack: Path) -> bool:
    """Tell whether a process was started for this stack and still runs. Raises psutil.Error if it cannot be read."""
    if process.status() == psutil.STATUS_ZOMBIE:
        return False
    if process.name() in RENAMED:
        return Path(process.cwd()).is_relative_to(stack)
    return process.environ().get(STACK) == str(stack)


def end(processes: Iterable[psutil.Process], grace: float) -> list[psutil.Process]:
    """Ask processes to end, kill those that have not after `grace` seconds, return those that are still there."""
    processes = list(processes)
    for process in processes:
        try:
            process.terminate()
        except psutil.Error:
            continue
    _, alive = psutil.wait_procs(processes, timeout=grace)
    for process in alive:
        try:
            process.kill()
        except psutil.Error:
            continue
    return list(psutil.wait_procs(alive, timeout=5)[1])


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
