"""How much a watcher costs: many streams of one task on one replica, on plain sockets.

    python -m load.watchers --url http://127.0.0.1:8101 --watchers 1000

Submits a heavy task, opens the streams, cancels the task and waits until every stream has ended. Says what memory the
replica's process has taken for them, and how long after the task's end the last watcher knew of it.
"""

import argparse
import asyncio
import json
import resource
import time
from datetime import datetime
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import psutil

OPENING = 50  # streams that are opened at a time
PATIENCE = 120  # seconds for each step


class Stream:
    """One watcher: its connection, how many events it got, the last of them and when that came."""

    def __init__(self) -> None:
        self.events = 0
        self.last: dict[str, object] = {}
        self.last_at = 0.0

    async def open(self, host: str, port: int, path: str) -> None:
        """Connect and read up to the first event. Raises `RuntimeError` for any other answer than a stream."""
        self._reader, self._writer = await asyncio.open_connection(host, port)
        self._writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        status = await self._reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(status.decode())
        while not self.events:
            await self._line()

    async def follow(self) -> None:
        """Read until the server ends the stream."""
        try:
            while await self._line():
                pass
        finally:
            self._writer.close()

    async def _line(self) -> bool:
        line = await self._reader.readline()
        if line.startswith(b"data: "):
            self.events += 1
            self.last = json.loads(line[6:])
            self.last_at = time.time()
        return bool(line)


def call(method: str, url: str, body: dict[str, object] | None = None) -> dict[str, object]:
    """The JSON answer to one request."""
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, {"Content-Type": "application/json"}, method=method)  # noqa: S310  the user's own URL
    with urlopen(request, timeout=PATIENCE) as answer:  # noqa: S310
        return dict(json.load(answer))


def process_at(port: int) -> psutil.Process:
    """The process that listens on `port`."""
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            return psutil.Process(connection.pid)
    raise SystemExit(f"no process of yours listens on port {port}")


async def measure(url: str, count: int) -> None:
    """Open the streams, end the task, print what it cost."""
    address = urlsplit(url)
    host, port = address.hostname or "", address.port or 80
    replica = process_at(port)
    accepted = call("POST", f"{url}/api/async/process", {"data": "watched", "iterations": 100_000, "priority": "high"})
    path = f"/api/async/tasks/{accepted['task_id']}"
    before = replica.memory_info().rss
    streams = [Stream() for _ in range(count)]
    door = asyncio.Semaphore(OPENING)

    async def enter(stream: Stream) -> None:
        async with door:
            await stream.open(host, port, f"{path}/stream")

    began = time.monotonic()
    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*map(enter, streams))
    opened = time.monotonic() - began
    following = [asyncio.create_task(stream.follow()) for stream in streams]
    cpu, began = replica.cpu_times(), time.monotonic()
    await asyncio.sleep(5)
    busy = sum(replica.cpu_times()[:2]) - sum(cpu[:2])
    share = 100 * busy / (time.monotonic() - began)
    after = replica.memory_info().rss
    await asyncio.to_thread(call, "DELETE", url + path)
    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*following)
    ended = sum(stream.last["status"] == "CANCELLED" for stream in streams)
    finished_at = datetime.fromisoformat(str(streams[0].last["finished_at"])).timestamp()
    print(f"watchers           {count}, opened in {opened:.1f} s, {ended} saw the end")
    print(f"memory             {before / 2**20:.1f} MiB before, {after / 2**20:.1f} MiB with them")
    print(f"a watcher          {(after - before) / 1024 / count:.1f} KiB")
    print(f"processor          {share:.0f} % of a core while the task reported progress")
    print(f"events             {sum(stream.events for stream in streams)}")
    print(f"the last one knew  {max(stream.last_at for stream in streams) - finished_at:.3f} s after the task's end")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8101", help="a replica, not nginx")
    parser.add_argument("--watchers", type=int, default=1000)
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(measure(arguments.url, arguments.watchers))


if __name__ == "__main__":
    main()
