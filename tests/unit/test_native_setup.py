"""What deploy/native/setup.sh decides, with its looks at the machine replaced."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[2] / "deploy" / "native" / "setup.sh"
ROOT = "is_root() { true; }"
USER = "is_root() { false; }"
ONLY = "has() { case $1 in %s) return 0;; *) return 1;; esac; }"
# Instead of installing, say what would be run.
RECORD = "quietly() { shift; echo ran: $*; }"
ASK = 'install_packages "nginx redis-server"'


def bash(*lines, stdin=subprocess.DEVNULL, **environment):
    script = "\n".join([f". {SETUP}", *lines])
    environment = {"PATH": os.environ["PATH"], **environment}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, stdin=stdin, env=environment
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def test_missing_servers_are_named():
    code, out, _ = bash(ONLY % "nginx", f"missing_packages {sys.executable}", VENV=sys.prefix)
    assert (code, out) == (0, "redis-server rabbitmq-server")


def test_a_python_without_venv_needs_its_package(tmp_path):
    everything = ONLY % "*"
    code, out, _ = bash(everything, "has_venv() { false; }", f"missing_packages {sys.executable}", VENV=str(tmp_path))
    version = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    assert (code, out) in {(0, version), (0, "python3-venv")}


def test_as_root_nothing_is_asked_and_no_sudo_used():
    code, out, _ = bash(ROOT, ONLY % "apt-get", RECORD, ASK)
    assert code == 0
    assert "from apt: nginx redis-server" in out
    assert "ran: sh -c" in out
    assert "sudo" not in out


def test_another_user_needs_sudo_once():
    code, out, _ = bash(USER, ONLY % "apt-get|sudo", RECORD, ASK)
    assert code == 0
    assert out.count("ran: sudo sh -c") == 1


def test_without_root_and_sudo_it_says_what_root_has_to_do():
    code, out, error = bash(USER, ONLY % "apt-get", RECORD, ASK)
    assert code == 1
    assert error == (
        "error: missing: nginx redis-server. Only root can install them: "
        "as root, apt-get install -y nginx redis-server, then make run again"
    )
    assert "ran" not in out


def test_without_apt_it_says_what_is_missing():
    code, _, error = bash(ROOT, ONLY % "nothing", RECORD, ASK)
    assert code == 1
    assert "no apt here" in error
    assert "nginx redis-server" in error


def test_an_old_python_is_told_so(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit\nexit 1\n')
    old.chmod(0o755)
    code, _, error = bash("main", PYTHON=str(old))
    assert code == 1
    assert error == (
        f"error: Python 3.11 or newer is needed, {old} is Python 3.9.2: "
        "install one, or name it: PYTHON=/path/to/python3.12 make run"
    )


def test_a_command_that_fails_shows_its_end_and_one_line():
    code, out, error = bash("quietly 'pip failed' sh -c 'seq 100; exit 3'; echo not reached")
    assert (code, out) == (1, "")
    assert error.splitlines()[-2] == "100"
    assert error.splitlines()[-1].startswith("error: pip failed (all it said: /")


def test_a_second_time_installs_nothing(tmp_path):
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    # Not a link: where this Python is a virtual environment's own, a link to it has lost the environment.
    (bin_ / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (bin_ / "python").chmod(0o755)
    record = "quietly() { echo installing >&2; }"
    first = bash(record, f"install_python_packages {sys.executable}", VENV=str(tmp_path))
    second = bash(record, f"install_python_packages {sys.executable}", VENV=str(tmp_path))
    assert "installing" in first[2]
    assert second == (0, "", "")


@pytest.mark.parametrize(("answer", "installs"), [("\n", True), ("y\n", True), ("n\n", False)])
def test_on_a_terminal_it_asks(answer, installs):
    master, terminal = pty.openpty()
    os.write(master, answer.encode())
    script = "\n".join([f". {SETUP}", ROOT, ONLY % "apt-get", RECORD, ASK])
    environment = {name: value for name, value in os.environ.items() if name != "YES"}
    done = subprocess.run(
        ["bash", "-c", script],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        timeout=9,
        check=False,
        env=environment,
    )
    shown = os.read(master, 10_000).decode()
    os.close(master)
    os.close(terminal)
    assert "Install now? [Y/n]" in shown
    assert ("ran: sh -c" in shown) is installs
    assert done.returncode == (0 if installs else 1)


def test_yes_is_an_answer_beforehand():
    master, terminal = pty.openpty()
    script = "\n".join([f". {SETUP}", ROOT, ONLY % "apt-get", RECORD, ASK])
    environment = {**os.environ, "YES": "1"}
    subprocess.run(
        ["bash", "-c", script], stdin=terminal, stdout=terminal, stderr=terminal, timeout=9, check=True, env=environment
    )
    shown = os.read(master, 10_000).decode()
    os.close(master)
    os.close(terminal)
    assert "Install now" not in shown
    assert "ran: sh -c" in shown
