"""Uvicorn's HTTP protocol, but an answer leaves in one write: `uvicorn --http app.api.protocol:OneWriteProtocol`.

Uvicorn writes the head of an answer and then its body. A replica that is killed between the two leaves nginx with a
head that it has passed on already: it cannot try the next replica, and the client gets half an answer.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class OneWriteTransport:
    """A transport that hands on what was written in one turn of the event loop together."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Keep `data` until the turn ends."""
        if not self._parts:
            asyncio.get_running_loop().call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        """Close after what was written."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts and not self._transport.is_closing():
            self._transport.write(b"".join(parts))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class OneWriteProtocol(HttpToolsProtocol):
    """The protocol over that transport."""

    def on_message_begin(self) -> None:
        """Begin a request; `state["abort"]` closes its connection without waiting for a client that does not read."""
        super().on_message_begin()
        self.scope["state"]["abort"] = self.transport.abort

    def shutdown(self) -> None:
        """Take part in the server's shutdown: what waits for a change is to end now, since the server waits for it.

        The server calls this for each connection when it has been told to stop; the application has put `drain` into
        the state of its lifespan (ASGI).
        """
        super().shutdown()
        if "drain" in self.app_state:
            self.app_state["drain"]()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take up a connection."""
        super().connection_made(OneWriteTransport(transport))  # type: ignore[arg-type]
