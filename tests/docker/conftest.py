"""What the tests of the compose stack need: a Docker engine that answers, and the image."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def why_not() -> str | None:
    """What keeps these tests from running here, if anything."""
    if not shutil.which("docker"):
        return "docker is not installed"
    for command in (("docker", "info"), ("docker", "compose", "version")):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            return f"`{' '.join(command)}` fails: {done.stderr.strip()[:200]}"
    return None


@pytest.fixture(scope="session", autouse=True)
def _engine() -> None:
    if reason := why_not():
        if os.environ.get("CI") == "true" and os.environ.get("DOCKER_REQUIRED") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.docker)
            item.add_marker(pytest.mark.timeout(900))  # the first build and start count for the first test
