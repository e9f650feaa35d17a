import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from app import problems
from app.engine import live as module
from app.engine import loops
from app.engine.live import Live, Update
from app.models import TaskStatus


def record(version: int, status: str = "PROGRESS", epoch: int = 1) -> dict[str, str]:
    """A record as Redis gives it."""
    return {
        "name": "heavy.process_data",
        "status": status,
        "payload": "{}",
        "attempts": "1",
        "queue": "heavy",
        "request_id": "r",
        "created_at": "1700000000000",
        "owner": "secret",
        "digest": "d",
        "epoch": str(epoch),
        "version": str(version),
    }


class Connection:
    """Redis's side of a pub/sub connection, as redis-py shows it."""

    def __init__(self, sent: list[tuple[str, ...]]) -> None:
        self.sent = sent
        self.answers: asyncio.Queue[Any] = asyncio.Queue()

    async def connect(self) -> None:
        pass

    async def send_command(self, command: str, *arguments: str, check_health: bool) -> None:
        assert check_health is False
        self.sent.append((command, *arguments))
        if command == "SUBSCRIBE":
            for argument in arguments:
                self.answers.put_nowait(["subscribe", argument, 1])

    async def read_response(self, *, timeout: float, disconnect_on_error: bool) -> Any:
        assert disconnect_on_error is False
        try:
            # What has arrived together is answered without a pause.
            if self.answers.empty():
                answer = await asyncio.wait_for(self.answers.get(), timeout)
            else:
                answer = self.answers.get_nowait()
        except TimeoutError:
            return None
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def disconnect(self) -> None:
        pass


class Servers:
    """The store, the archive and the pool of connections, in memory."""

    def __init__(self) -> None:
        self.records_now: dict[str, dict[str, str]] = {}
        self.archived: dict[str, dict[str, Any]] = {}
        self.reads: list[list[str]] = []
        self.connections: list[Connection] = []
        self.sent: list[tuple[str, ...]] = []
        self.away = False
        self.asked_archive = False

    @property
    def redis(self) -> "Servers":
        return self

    @property
    def connection_pool(self) -> "Servers":
        return self

    def make_connection(self) -> Connection:
        self.connections.append(Connection(self.sent))
        return self.connections[-1]

    async def records(self, task_ids: list[str]) -> list[dict[str, str]]:
        self.reads.append(task_ids)
        await asyncio.sleep(0)
        if self.away:
            raise RedisConnectionError("away")
        return [self.records_now.get(task_id, {}) for task_id in task_ids]

    async def get(self, task_id: str) -> dict[str, Any] | None:
        self.asked_archive = True
        return self.archived.get(task_id)

    def change(self, task_id: str, fields: dict[str, str]) -> None:
        """Write a record and announce it."""
        self.records_now[task_id] = fields
        self.connections[-1].answers.put_nowait(["message", f"task:{task_id}", fields["version"]])


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Servers:
    monkeypatch.setattr(module, "PAUSE", 0.01)
    return Servers()


@asynccontextmanager
async def opened(servers: Servers, *, limit: int = 10, heartbeat: float = 60) -> AsyncIterator[Live]:
    async with Live(servers, servers, limit=limit, heartbeat=heartbeat) as live:
        yield live


async def eventually(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_an_update_says_what_the_status_says_and_nothing_of_ours():
    update = Update(module.document("t", record(3)))
    assert update.json() == TaskStatus.model_validate(update.document).model_dump_json().encode()
    assert orjson.loads(update.json()).keys() == TaskStatus.model_fields.keys()
    assert b"secret" not in update.json()


def test_the_id_of_the_end_is_the_id_of_nothing_else():
    versions = [record(3), record(4), record(3, epoch=2), record(3, "SUCCESS"), record(3, "FAILURE", 2)]
    assert [Update(module.document("t", fields)).id for fields in versions] == [
        "1.3",
        "1.4",
        "2.3",
        "1.3-final",
        "2.3-final",
    ]


async def test_nothing_is_opened_before_somebody_watches(servers: Servers):
    async with opened(servers, heartbeat=0.01):
        await asyncio.sleep(0.1)
    assert (servers.connections, servers.reads) == ([], [])


async def test_the_record_is_read_after_the_subscription_and_each_change_is_told(servers: Servers):
    servers.records_now["t"] = record(1, "PENDING")
    async with opened(servers) as live:
        with live.watch("t") as watch:
            first = await watch.next(5)
            assert (first.id, servers.sent) == ("1.1", [("SUBSCRIBE", "task:t")])
            servers.change("t", record(2))
            assert (await watch.next(5)).id == "1.2"
            servers.change("t", record(3, "SUCCESS"))
            last = await watch.next(5)
            assert (last.id, last.final) == ("1.3-final", True)
        await eventually(lambda: ("UNSUBSCRIBE", "task:t") in servers.sent)
        assert live.watches == 0


async def test_what_was_seen_is_not_told_again(servers: Servers):
    servers.records_now["t"] = record(5)
    async with opened(servers) as live:
        with live.watch("t", seen="1.5") as watch:
            await eventually(lambda: servers.reads)
            assert await watch.next(0.05) is None
            servers.change("t", record(6))
            assert (await watch.next(5)).id == "1.6"


async def test_whoever_is_slow_is_told_the_latest_alone(servers: Servers):
    servers.records_now["t"] = record(1)
    async with opened(servers) as live:
        with live.watch("t") as slow, live.watch("t") as quick:
            await slow.next(5)
            for version in range(2, 6):
                servers.change("t", record(version))
                while (await quick.next(5)).id != f"1.{version}":
                    pass
            assert (await slow.next(5)).id == "1.5"
            assert await slow.next(0.02) is None


async def test_a_thousand_watchers_share_one_connection_one_read_and_one_document(servers: Servers):
    servers.records_now["t"] = record(1)
    async with opened(servers, limit=1000) as live:
        watches = [live.watch("t") for _ in range(1000)]
        await asyncio.gather(*(watch.next(5) for watch in watches))
        reads = len(servers.reads)
        servers.change("t", record(2))
        updates = await asyncio.gather(*(watch.next(5) for watch in watches))
        assert len({id(update) for update in updates}) == 1
        assert (len(servers.reads), len(servers.connections)) == (reads + 1, 1)
        for watch in watches:
            watch.__exit__(None, None, None)
        assert live.watches == 0


async def test_many_changed_records_are_read_together(servers: Servers):
    names = [f"t{number}" for number in range(40)]
    servers.records_now = {name: record(1) for name in names}
    async with opened(servers, limit=40) as live:
        watches = [live.watch(name) for name in names]
        await asyncio.gather(*(watch.next(5) for watch in watches))
        assert len(servers.reads) < 5
        assert [sent[0] for sent in servers.sent] == ["SUBSCRIBE"]


async def test_one_who_joins_later_is_not_told_what_is_older_than_what_it_knows(servers: Servers):
    servers.records_now["t"] = record(1)
    async with opened(servers) as live:
        with live.watch("t") as early:
            await early.next(5)
            # The notice of version 2 is still on its way when a client comes that has seen it on another replica.
            servers.records_now["t"] = record(2)
            with live.watch("t", seen="1.2") as late:
                assert (await early.next(5)).id == "1.2"
                assert await late.next(0.02) is None


async def test_a_lost_notice_is_only_late(servers: Servers):
    servers.records_now["t"] = record(1)
    async with opened(servers, heartbeat=0.05) as live:
        with live.watch("t") as watch:
            await watch.next(5)
            servers.records_now["t"] = record(2, "SUCCESS")
            assert (await watch.next(5)).final


async def test_a_lost_connection_is_opened_again_and_the_record_read(servers: Servers):
    servers.records_now["t"] = record(1)
    async with opened(servers) as live:
        with live.watch("t") as watch:
            await watch.next(5)
            servers.records_now["t"] = record(2, "SUCCESS")
            servers.connections[0].answers.put_nowait(RedisConnectionError("closed"))
            assert (await watch.next(5)).final
        assert len(servers.connections) == 2


async def test_a_connection_that_gives_no_sign_of_life_is_replaced(servers: Servers):
    servers.records_now["t"] = record(1)
    async with opened(servers, heartbeat=0.05) as live:
        with live.watch("t"):
            await eventually(lambda: len(servers.connections) > 1)
    assert ("PING",) in servers.sent


async def test_a_redis_that_is_away_is_asked_again_without_spinning(servers: Servers, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loops, "PAUSE", 0.05)
    servers.records_now["t"] = record(1)
    servers.away = True
    async with opened(servers) as live:
        with live.watch("t") as watch:
            assert await watch.next(0.3) is None
            assert not live.readable
            assert 2 <= len(servers.reads) <= 7
            servers.away = False
            assert (await watch.next(5)).id == "1.1"
            assert live.readable


async def test_the_archive_answers_for_a_record_that_has_left_redis(servers: Servers):
    servers.archived["t"] = module.document("t", record(9, "SUCCESS"))
    async with opened(servers) as live:
        with live.watch("t") as watch:
            assert (await watch.next(5)).id == "1.9-final"


async def test_a_record_that_is_made_again_is_waited_for_and_one_that_is_not_ends_the_watch(servers: Servers):
    servers.records_now["t"] = record(4)
    async with opened(servers, heartbeat=0.1) as live:
        with live.watch("t") as watch:
            assert (await watch.next(5)).id == "1.4"
            del servers.records_now["t"]
            await eventually(lambda: servers.asked_archive)
            servers.records_now["t"] = record(1)
            assert (await watch.next(5)).id == "1.1"
            assert not watch.over
            del servers.records_now["t"]
            assert await watch.next(5) is None
            assert watch.over


async def test_a_record_that_cannot_be_read_does_not_stop_the_others(servers: Servers):
    servers.records_now = {"bad": {"status": "PROGRESS"}, "good": record(1)}
    async with opened(servers) as live:
        with live.watch("bad"), live.watch("good") as good:
            assert (await good.next(5)).id == "1.1"


async def test_watchers_are_bounded(servers: Servers):
    async with opened(servers, limit=2) as live:
        with live.watch("a"):
            with live.watch("b"), pytest.raises(problems.WatchersFull):
                live.watch("a")
            with live.watch("c"):
                pass
        assert live.watches == 0


async def test_draining_ends_every_wait_at_once(servers: Servers):
    servers.records_now["t"] = record(1)
    async with opened(servers) as live:
        with live.watch("t") as watch:
            await watch.next(5)
            waiting = asyncio.create_task(watch.next(60))
            await asyncio.sleep(0.01)
            live.drain()
            live.drain()
            assert await asyncio.wait_for(waiting, 5) is None
            assert watch.over
        with live.watch("t") as watch:
            assert await asyncio.wait_for(watch.next(60), 5) is None


async def test_a_closed_watch_waits_no_longer_and_a_cancelled_one_leaves_nothing(servers: Servers):
    servers.records_now["t"] = record(1)
    async with opened(servers) as live:
        with live.watch("t", seen="1.1") as watch:
            waiting = asyncio.create_task(watch.next(60))
            await asyncio.sleep(0.01)
            watch.close()
            assert await asyncio.wait_for(waiting, 5) is None

        async def wait() -> None:
            with live.watch("t", seen="1.1") as watch:
                await watch.next(60)

        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert live.watches == 0
        await eventually(lambda: ("UNSUBSCRIBE", "task:t") in servers.sent)


async def test_the_end_comes_although_a_loop_misses_its_first_cancellation(servers: Servers):
    # As redis-py's send does in Python 3.11 when it is cancelled in the moment of its success.
    missed = 0

    async def records(_: list[str]) -> list[dict[str, str]]:
        nonlocal missed
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            missed += 1
            if missed > 1:
                raise
        return [{}]

    servers.records = records
    async with asyncio.timeout(5), opened(servers) as live:
        with live.watch("t"):
            await asyncio.sleep(0.05)
    assert missed == 1
