import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.native import processes

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
WILLING = "import time; print('on', flush=True); time.sleep(60)"


@pytest.fixture
def start(tmp_path):
    started = []

    def popen(code, stack=tmp_path):
        environment = {**os.environ, processes.STACK: str(stack)}
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        started.append(process)
        return process

    yield popen
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def found(stack, name=None):
    return {process.pid for process in processes.of_stack(stack, name)}


def test_processes_are_found_by_the_stack_they_were_started_for(start, tmp_path):
    ours = start(WILLING)
    start(WILLING, tmp_path / "other")
    assert found(tmp_path) == {ours.pid}
    assert found(tmp_path, "nginx") == set()


def test_what_runs_in_a_container_is_not_ours(start, tmp_path, monkeypatch):
    start(WILLING)
    monkeypatch.setattr(Path, "readlink", lambda self: Path(f"of {'us' if 'self' in self.parts else 'a container'}"))
    assert found(tmp_path) == set()


@pytest.mark.parametrize(("code", "signal"), [(WILLING, 15), (STUBBORN, 9)], ids=["willing", "stubborn"])
def test_processes_are_asked_to_end_and_then_killed(start, tmp_path, code, signal):
    process = start(code)
    ours = processes.of_stack(tmp_path)
    # Seen before anything is ended: what is wrong here would end all else on the machine.
    assert [one.pid for one in ours] == [process.pid]
    assert processes.end(ours, grace=0.5) == []
    assert process.wait(timeout=5) == -signal


def test_a_command_never_finds_itself_or_what_started_it(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "belongs", lambda *_: True)
    assert not found(tmp_path) & {1, os.getpid(), os.getppid()}


def test_children_are_those_that_run():
    before = processes.children(os.getpid())
    with subprocess.Popen(["sleep", "60"]) as process:
        assert processes.children(os.getpid()) - before == {process.pid}
        process.kill()
    assert processes.children(2**22 + 1) == set()
