"""A task's changes as Server-Sent Events (WHATWG HTML, section 9.2), as plain ASGI.

The responses of Starlette and FastAPI hold several tasks and a queue for each stream. Here a stream is the request's
own task and one that hears of the client's leaving; what it has not sent is the one update that all watchers share.
"""

import asyncio
import random
from typing import Any

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app import problems
from app.api.waiting import ended_by_leaving, left, release
from app.engine.live import Live, Update, Watch

RETRY = (1000, 3000)  # ms after which a client comes back; spread, for when a replica stops under many of them
LARGE = 64 * 1024  # bytes of a document from which on few are sent at a time: each is copied on its way
WAITING = b": waiting\n\n"
UNREADABLE = b": the task's record cannot be read now, trying again\n\n"

log = structlog.get_logger(__name__)

EXAMPLE = """retry: 2100

id: 1.4
data: {"task_id":"0d2d3c91-7ae2-850c-9610-0f22a0d26f32","status":"PROGRESS","progress":{"current":400,"total":20000,"progress":2.0}}

: waiting

"""  # noqa: E501
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events whose data is the document that the status answers.",
        "content": {"text/event-stream": {"schema": {"type": "string"}, "example": EXAMPLE}},
    },
    204: {"description": "The final event was seen (`Last-Event-ID`)."},
    503: problems.example(problems.WatchersFull),
}


class TaskStream(Response):
    """The events of one task for one client.

    `present` is what the caller has just read, `seen` the id of the last event that the client saw; a client that does
    not take what it is sent within `send_timeout` seconds is dropped. Raises `WatchersFull` before it has begun.
    """

    media_type = "text/event-stream"

    def __init__(self, live: Live, task_id: str, present: Update, seen: str, *, send_timeout: float) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._live = live
        self._task_id = task_id
        self._present = present
        self._seen = seen
        self._send_timeout = send_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the stream (ASGI 3) until the task has ended, the client has left, or the process is told to stop."""
        state = scope["state"]
        with self._live.watch(self._task_id, seen=self._present.id) as watch:
            release(scope)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async with ended_by_leaving(receive, watch):
                    if not state.get("head"):
                        await self._tell(watch, send)
            except TimeoutError:
                log.info("a stream's client was too slow", task_id=self._task_id)
                if "abort" not in state:  # another server than OneWriteProtocol's
                    raise
                state["abort"]()
                await left(receive)
                return
        await send({"type": "http.response.body"})

    async def _tell(self, watch: Watch, send: Send) -> None:
        update = None if self._present.id == self._seen else self._present
        head = b"retry: %d\n\n" % random.randint(*RETRY)  # noqa: S311  not for secrets
        while update is not None or not watch.over:
            await self._write(send, head, update)
            if update is not None and update.final:
                return
            head = b""
            update = await watch.next(self._live.heartbeat)
        if head:
            await self._write(send, head, None)

    async def _write(self, send: Send, head: bytes, update: Update | None) -> None:
        if update is None:
            await self._send(send, head + (WAITING if self._live.readable else UNREADABLE))
        elif len(update.json()) < LARGE:
            await self._send(send, head + event(update))
        else:
            async with self._live.large:
                await self._send(send, head + event(update))

    async def _send(self, send: Send, data: bytes) -> None:
        """Send, and return when the client has taken it but for what fits its connection's buffers.

        Raises `TimeoutError` when it does not in time.
        """
        async with asyncio.timeout(self._send_timeout):
            await send({"type": "http.response.body", "body": data, "more_body": True})
            # What was written is handed on when the turn ends (OneWriteProtocol); only then is known if it is too much.
            await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": b"", "more_body": True})


def event(update: Update) -> bytes:
    """The event that tells `update`; JSON has no line ends that would part it."""
    return b"id: %b\ndata: %b\n\n" % (update.id.encode(), update.json())
