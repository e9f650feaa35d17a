"""What stands before every handler, as plain ASGI: the request's id and edge key, one log line, the body's bound."""

import re
import time
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import problems

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

log = structlog.get_logger(__name__)


class Edge:
    """Gives each request its id (`X-Request-ID`, the client's if it is well-formed) and its edge key, and logs it.

    The edge key (`X-Edge-Request-Id`) is nginx's name for one client request, the same when nginx tries the next
    replica. It is believed only from `trusted` addresses and networks; elsewhere a random one takes its place.
    """

    def __init__(self, app: ASGIApp, trusted: tuple[str, ...]) -> None:
        self.app = app
        networks = [ip_network(entry, strict=False) for entry in trusted]
        self._trusts = lru_cache(maxsize=1024)(lambda host: _within(host, networks))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI 3)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid4().hex
        trusted = self._trusts(scope["client"][0]) if scope.get("client") else False
        edge_key = headers.get("x-edge-request-id") if trusted else None
        scope.setdefault("state", {}).update(request_id=request_id, edge_key=edge_key or uuid4().hex)
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        began, status = time.monotonic(), 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            write = log.debug if scope["path"].startswith("/health") else log.info
            milliseconds = round((time.monotonic() - began) * 1000, 1)
            write("request", method=scope["method"], path=scope["path"], status=status, ms=milliseconds)


class BodyLimit:
    """Refuses bodies of more than `limit` bytes with 413, also those that do not tell their length beforehand."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI 3)."""
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        told = headers.get("content-length", "")
        if told.isdecimal() and int(told) > self._limit:
            await self._refuse(scope, send)
        elif headers.get("transfer-encoding") is None:
            await self.app(scope, receive, send)
        elif (body := await self._read(receive)) is None:
            await self._refuse(scope, send)
        else:
            await self.app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        body = bytearray()
        while len(body) <= self._limit:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                return bytes(body) if len(body) <= self._limit else None
        return None

    async def _refuse(self, scope: Scope, send: Send) -> None:
        problem = problems.BodyTooLarge(f"The body is larger than {self._limit} bytes.")
        status, headers, body = problems.render(
            problem, instance=scope["path"], request_id=scope["state"]["request_id"]
        )
        # What is left of the body is not read: the connection ends here.
        raw = [(name.encode(), value.encode()) for name, value in {**headers, "connection": "close"}.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": body})


def _replay(body: bytes, receive: Receive) -> Receive:
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


def _within(host: str, networks: list[IPv4Network | IPv6Network]) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return any(address in network for network in networks)
