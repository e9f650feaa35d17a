"""How many requests a replica works at, as plain ASGI: past that it says so at once instead of getting ever slower."""

from collections.abc import Callable

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from app import problems
from app.api.errors import respond
from app.api.paths import own_path


class Admission:
    """Lets at most `limit` requests be in work; further ones get 503 with a time to come back. Probes always pass.

    A handler that begins to wait for others' sake, and only holds a connection from then on, gives its place back by
    calling `scope["state"]["release"]()`; how many may wait so is for whoever lets them wait to bound.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self._limit = limit
        self._busy = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI 3)."""
        if scope["type"] != "http" or own_path(scope) == "/health" or own_path(scope).startswith("/health/"):
            await self.app(scope, receive, send)
        elif self._busy >= self._limit:
            await respond(Request(scope), problems.Overloaded())(scope, receive, send)
        else:
            release = scope["state"]["release"] = self._place()
            try:
                await self.app(scope, receive, send)
            finally:
                release()

    def _place(self) -> Callable[[], None]:
        self._busy += 1
        held = True

        def release() -> None:
            nonlocal held
            if held:
                held = False
                self._busy -= 1

        return release
