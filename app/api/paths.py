"""Paths of an application that clients find below a prefix: a service behind the gateway."""

from starlette.types import ASGIApp, Receive, Scope, Send


def own_path(scope: Scope) -> str:
    """The path as the application itself names it, without the prefix (`root_path` of ASGI, which `path` includes)."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "")
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path


class Mounted:
    """Puts back the prefix that nginx has taken off each path, so that links and problems name what clients know."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self.app, self._prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI 3)."""
        if scope["type"] == "http":
            path = own_path({**scope, "root_path": self._prefix})
            scope = {**scope, "root_path": self._prefix, "path": f"{self._prefix}{path}"}
        await self.app(scope, receive, send)
