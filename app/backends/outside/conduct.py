"""How each router behaves, to be changed while it runs: a device to teach and to test by, absent from production."""

import asyncio
from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import problems
from app.backends.outside.errors import rendered
from app.contracts import Backend

router = APIRouter(prefix="/conduct", tags=["conduct"])

BODY_MAX = 65_536  # bytes
UNDOING = ("release", "cancel", "refund", "recall")  # what nobody refuses
ROUTERS = tuple(str(name) for name in Backend)


class Refusing(problems.Problem):
    """It was told to refuse (PUT /conduct)."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    slug = "refused"


class Broken(problems.Problem):
    """It was told to be broken (PUT /conduct)."""

    slug = "broken"


class Conduct(BaseModel):
    """How a router behaves; `calls` counts the requests that have come since it was told.

    `refusing` refuses what is new, and takes back what was done all the same.
    """

    mode: Literal["normal", "slow", "broken", "refusing"] = "normal"
    seconds: float = Field(1, ge=0, le=60, description="How long `slow` keeps a caller waiting.")
    when: Literal["before", "after"] = Field("after", description="Whether `slow` waits before it works, or after.")
    calls: int = Field(0, ge=0, le=0, description="Not to be set.")


@router.get("")
async def list_conducts(request: Request) -> dict[str, Conduct]:
    """How each router behaves."""
    conducts: dict[str, Conduct] = request.app.state.conducts
    return conducts


@router.put("/{name}")
async def put_conduct(name: Annotated[Backend, Path()], conduct: Conduct, request: Request) -> Conduct:
    """Have a router behave otherwise, until it is told again or this process ends."""
    request.app.state.conducts[str(name)] = conduct
    return conduct


class Conducted:
    """Has each router behave as it was told (plain ASGI). A caller that has gone is served to the end all the same."""

    def __init__(self, app: ASGIApp, conducts: dict[str, Conduct]) -> None:
        self.app = app
        self._conducts = conducts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI 3)."""
        conduct = self._conducts.get(scope["path"].split("/")[1]) if scope["type"] == "http" else None
        if conduct is None:
            await self.app(scope, receive, send)
            return
        conduct.calls += 1
        match conduct.mode:
            case "broken":
                await rendered(scope, Broken())(scope, receive, send)
            case "refusing" if scope["path"].rpartition("/")[2] not in UNDOING:
                await rendered(scope, Refusing())(scope, receive, send)
            case "slow" if conduct.when == "before":
                # Read first: of a caller that has gone there would be nothing left to read.
                received = await _request(receive)
                await asyncio.sleep(conduct.seconds)
                await self.app(scope, _again(received, receive), send)
            case "slow":
                await self.app(scope, receive, _late(send, conduct.seconds))
            case _:
                await self.app(scope, receive, send)


async def _request(receive: Receive) -> list[Message]:
    messages = [await receive()]
    size = len(messages[0].get("body", b""))
    while messages[-1].get("more_body") and size <= BODY_MAX:
        messages.append(await receive())
        size += len(messages[-1].get("body", b""))
    return messages


def _again(messages: list[Message], receive: Receive) -> Receive:
    rest = iter(messages)

    async def again() -> Message:
        return next(rest, None) or await receive()

    return again


def _late(send: Send, seconds: float) -> Send:
    async def later(message: Message) -> None:
        if message["type"] == "http.response.start":
            await asyncio.sleep(seconds)
        await send(message)

    return later
