"""The native stack, started once a run on free ports and with a directory of its own, and stopped at the end."""

from collections.abc import AsyncIterator, Iterator

import httpx
import pymongo
import pytest
import redis

from app.context import Context, open_context
from tests.integration.harness import Stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    running = Stack(tmp_path_factory.mktemp("stack"))
    started = running.run("up", "--no-demo", check=False)
    assert started.returncode == 0, started.stdout + started.stderr
    yield running
    running.run("clean")


@pytest.fixture
def api(stack: Stack) -> Iterator[httpx.Client]:
    """A client of the stack, through nginx."""
    with httpx.Client(base_url=stack.url, timeout=30) as client:
        yield client


@pytest.fixture
async def context(stack: Stack) -> AsyncIterator[Context]:
    """The stack's servers as the API sees them, for tasks that have no route."""
    # PyMongo fills a pool in the background, and leaves a connection behind when it is closed meanwhile.
    settings = stack.settings.model_copy(update={"mongodb_pool_min": 0})
    async with open_context(settings, service="test") as opened:
        yield opened


@pytest.fixture
def records(stack: Stack) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(stack.settings.redis_url.get_secret_value(), decode_responses=True) as client:
        yield client


@pytest.fixture
def archive(stack: Stack) -> Iterator[pymongo.collection.Collection]:
    with pymongo.MongoClient(stack.settings.mongodb_url.get_secret_value()) as client:
        yield client["stack"]["task_results"]
