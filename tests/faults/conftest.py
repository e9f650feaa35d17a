"""A stack of the campaign's own, with two of everything that there may be two of, and the table at the end."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.faults.load import Rates
from tests.faults.report import Row, markdown, write
from tests.faults.witness import Stalls, witnessed
from tests.integration.harness import ROOT, Stack

REPORT = Path(os.environ.get("FAULTS_REPORT", ROOT / ".faults"))
# By the harness, for other tests; here the defaults are tried.
SHORTENED = (
    "PUBLISH_TIMEOUT", "LIGHT_SOFT_TIME_LIMIT", "LIGHT_TIME_LIMIT", "WORKER_SOFT_SHUTDOWN_TIMEOUT", "RECONCILE_AFTER",
    "RECONCILE_INTERVAL",
)  # fmt: skip
ROWS: list[Row] = []


@pytest.fixture(scope="session")
def factor() -> float:
    """How long and how much: 1 takes about a quarter of an hour for the whole table."""
    return float(os.environ.get("FAULTS_FACTOR", "1"))


@pytest.fixture(scope="session")
def rates() -> Rates:
    """The load, times FAULTS_LOAD: less than 1 for a machine that is slow, or busy with something else."""
    times = float(os.environ.get("FAULTS_LOAD", "1"))
    return Rates(**{name: rate * times for name, rate in asdict(Rates()).items()})


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    running = Stack(tmp_path_factory.mktemp("faults"))
    for name in SHORTENED:
        running.environment.pop(name)
    running.environment |= {"API_REPLICAS": "2", "HEAVY_WORKERS": "2", "BEATS": "2", "LOG_FORMAT": "json"}
    started = running.run("up", "--no-demo", check=False)
    assert started.returncode == 0, started.stdout + started.stderr
    yield running
    shutil.copytree(running.layout.logs, REPORT / "logs", dirs_exist_ok=True)
    running.run("clean")


@pytest.fixture(scope="session")
def stalls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stalls]:
    with witnessed(tmp_path_factory.mktemp("witness") / "stalls") as seen:
        yield seen


@pytest.fixture
def rows() -> Iterator[list[Row]]:
    """The table so far; written after each row, so that a run that is broken off leaves what it had."""
    yield ROWS
    write(ROWS, REPORT)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if ROWS:
        terminalreporter.section("faults")
        terminalreporter.write(markdown(ROWS))
        terminalreporter.write_line(f"also in {REPORT}, with all logs")
