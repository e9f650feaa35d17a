"""Waiting for a task within a request: `?wait=` and `Prefer: wait=` (RFC 7240), and what all waits have in common."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, Header, Request, Response
from starlette.types import Receive, Scope

from app import problems
from app.api.dependencies import LiveDep
from app.engine.live import Live, Update, Watch

WAIT_MAX = 30  # seconds; nginx reads an answer for 35

# A comma inside a quoted string parts nothing.
PREFERENCES = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*")+')
NAMED = re.compile(r"wait\s*(?:[=;]|$)", re.IGNORECASE)
WAIT = re.compile(r"wait\s*=\s*(?P<quote>\"?)(?P<seconds>[0-9]{1,9})(?P=quote)\s*(?:;.*)?", re.IGNORECASE)


def preferred_wait(fields: Iterable[str]) -> int | None:
    """The seconds of `wait` in a request's `Prefer` fields, `WAIT_MAX` at most; None where it is not or makes no sense.

    The first of several counts (RFC 7240, section 2).
    """
    preferences = [preference.strip() for preference in PREFERENCES.findall(",".join(fields))]
    named = next(filter(NAMED.match, preferences), "")
    match = WAIT.fullmatch(named)
    return min(int(match["seconds"]), WAIT_MAX) if match else None


class Waiting:
    """Waits for a task's end in the name of the present request, up to a number of seconds after its arrival."""

    def __init__(self, request: Request, response: Response, live: Live) -> None:
        self._request = request
        self._response = response
        self._live = live
        self._began = asyncio.get_running_loop().time()
        self._preferred = preferred_wait(request.headers.getlist("prefer"))

    async def __call__(self, task_id: str, asked: int | None = None) -> Update | None:
        """The task's final update if there is one in time, else the latest that was seen, if any.

        `asked` is the number of seconds that the URL asks for and wins over the preference. Where no more may wait, or
        the process stops, the answer comes at once.
        """
        seconds = self._preferred if asked is None else asked
        if not seconds or self._live.draining:
            return None
        try:
            watch = self._live.watch(task_id)
        except problems.WatchersFull:
            return None
        release(self._request.scope)
        update = None
        with watch:
            async with ended_by_leaving(self._request.receive, watch):
                while latest := await watch.next(self._began + seconds - asyncio.get_running_loop().time()):
                    update = latest
                    if update.final:
                        break
        if not self._live.draining:
            self.applied(asked)
        return update

    def applied(self, asked: int | None = None) -> None:
        """Tell the client that its preference, if it is what counts, was honoured."""
        if self._preferred and asked is None:
            self._response.headers["Preference-Applied"] = f"wait={self._preferred}"


async def get_waiting(
    request: Request,
    response: Response,
    live: LiveDep,
    prefer: Annotated[  # noqa: ARG001  for the documentation; there may be several
        str | None,
        Header(description=f"`wait=N`: answer when the task has ended, or after N seconds (at most {WAIT_MAX})."),
    ] = None,
) -> Waiting:
    """The waiting of this request. A function that is awaited: FastAPI would make a class in another thread."""
    return Waiting(request, response, live)


def release(scope: Scope) -> None:
    """Give back what the request holds of the API's bounded concurrency: to wait costs next to nothing."""
    if give_back := scope["state"].get("release"):
        give_back()


@asynccontextmanager
async def ended_by_leaving(receive: Receive, watch: Watch) -> AsyncIterator[None]:
    """Close `watch` when the client goes away."""
    leaving = asyncio.create_task(left(receive))
    leaving.add_done_callback(lambda _: watch.close())
    try:
        yield
    finally:
        leaving.cancel()


async def left(receive: Receive) -> None:
    """Return when the client has gone away (or what it asked for is answered)."""
    while (await receive())["type"] != "http.disconnect":
        pass


WaitDep = Annotated[Waiting, Depends(get_waiting)]
