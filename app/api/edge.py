"""What stands before every handler, as plain ASGI: the request's id and edge key, and one log line."""

import re
import time
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import problems
from app.api.paths import own_path

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

log = structlog.get_logger(__name__)


class Edge:
    """Gives each request its id (`X-Request-ID`, the client's if it is well-formed) and its edge key, and logs it.

    The edge key (`X-Edge-Request-Id`) is nginx's name for one client request, the same when nginx tries the next
    replica. It is believed only from `trusted` addresses and networks; elsewhere a random one takes its place.

    A body whose told length is over `body_max` bytes is refused here, since FastAPI, which bounds the others, would
    answer it in plain text.
    """

    def __init__(self, app: ASGIApp, trusted: tuple[str, ...], body_max: int) -> None:
        self.app = app
        self._body_max = body_max
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
        scope.setdefault("state", {}).update(
            request_id=request_id, edge_key=edge_key or uuid4().hex, head=scope["method"] == "HEAD"
        )
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        began, status = time.monotonic(), 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        # HEAD is answered like GET (RFC 9110, section 9.3.2); the server, which knows better, leaves the body away.
        served = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        told = headers.get("content-length", "")
        try:
            if told.isdecimal() and int(told) > self._body_max:
                await self._refuse(request_id, scope["path"], send_with_id)
            else:
                await self.app(served, receive, send_with_id)
        finally:
            write = log.debug if own_path(scope).startswith("/health") else log.info
            milliseconds = round((time.monotonic() - began) * 1000, 1)
            write("request", method=scope["method"], path=scope["path"], status=status, ms=milliseconds)

    async def _refuse(self, request_id: str, path: str, send: Send) -> None:
        problem = problems.BodyTooLarge(f"The body is larger than {self._body_max} bytes.")
        status, headers, body = problems.render(problem, instance=path, request_id=request_id)
        # The body is not read, so the connection cannot serve another request.
        headers |= {"content-length": str(len(body)), "connection": "close"}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": body})


def _within(host: str, networks: list[IPv4Network | IPv6Network]) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return any(address in network for network in networks)
