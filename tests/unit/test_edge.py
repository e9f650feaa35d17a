from collections.abc import Callable
from typing import Any

import httpx
import orjson
import pytest
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from app.api.edge import Edge

TRUSTED = ("10.0.0.0/8", "127.0.0.1", "fd00::/8")

ClientOf = Callable[[Any], httpx.AsyncClient]


async def tells(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer what Edge says of the request."""
    await JSONResponse(scope["state"])(scope, receive, send)


class Connection:
    """One connection of a hand-made scope: what the client sends, and what it gets."""

    def __init__(self, *chunks: bytes, client: tuple[str, int] | None = ("10.1.2.3", 5), **headers: str) -> None:
        self.scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": "/here",
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
            "client": client,
        }
        self.incoming: list[Message] = [
            {"type": "http.request", "body": chunk, "more_body": number < len(chunks)}
            for number, chunk in enumerate(chunks, start=1)
        ]
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        return self.incoming.pop(0) if self.incoming else {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def answer(self, app: Any) -> Any:
        await app(self.scope, self.receive, self.send)
        return orjson.loads(self.sent[1]["body"])

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    def header(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.sent[0]["headers"] if key.lower() == name]


async def edge_key(peer: str | None) -> str:
    connection = Connection(client=peer and (peer, 5), x_edge_request_id="of-the-edge")
    return (await connection.answer(Edge(tells, TRUSTED, 100)))["edge_key"]


@pytest.mark.parametrize("given", ["a", "Az09._-", "x" * 64, "7e324e54-153a-8efa-8e48-4085fddbe031"])
async def test_a_well_formed_request_id_is_kept(given: str):
    connection = Connection(x_request_id=given)
    assert (await connection.answer(Edge(tells, TRUSTED, 100)))["request_id"] == given
    assert connection.header(b"x-request-id") == [given.encode()]


@pytest.mark.parametrize("given", ["", " ", "x" * 65, "a b", "a\n", "a/b", "é", "a;b", '"a"', "a\0"])
async def test_a_malformed_request_id_is_replaced(given: str):
    connection = Connection(x_request_id=given)
    made = (await connection.answer(Edge(tells, TRUSTED, 100)))["request_id"]
    assert len(made) == 32
    assert made.isalnum()
    assert connection.header(b"x-request-id") == [made.encode()]


async def test_every_request_without_an_id_gets_its_own():
    edge = Edge(tells, TRUSTED, 100)
    first, second = await Connection().answer(edge), await Connection().answer(edge)
    assert len({first["request_id"], first["edge_key"], second["request_id"], second["edge_key"]}) == 4


async def test_the_response_has_the_id_once_whatever_the_application_says(client_of: ClientOf):
    async def talkative(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse({}, headers={"X-Request-ID": "of-the-handler"})(scope, receive, send)

    async with client_of(Edge(talkative, TRUSTED, 100)) as client:
        response = await client.get("/", headers={"X-Request-ID": "r-1"})
    assert response.headers.get_list("x-request-id") == ["r-1"]


@pytest.mark.parametrize("peer", ["10.255.0.1", "127.0.0.1", "fd00::17"])
async def test_the_edge_key_of_a_trusted_peer_is_believed(peer: str):
    assert await edge_key(peer) == "of-the-edge"


@pytest.mark.parametrize("peer", ["11.0.0.1", "127.0.0.2", "::1", "testclient", "", None])
async def test_the_edge_key_of_anybody_else_is_not_believed(peer: str | None):
    assert await edge_key(peer) != "of-the-edge"
    assert await edge_key(peer) != await edge_key(peer)


async def test_nobody_is_trusted_where_no_proxy_is():
    connection = Connection(client=("127.0.0.1", 5), x_edge_request_id="of-the-edge")
    assert (await connection.answer(Edge(tells, (), 100)))["edge_key"] != "of-the-edge"


async def test_the_forwarding_headers_do_not_change_who_is_trusted():
    connection = Connection(client=("11.0.0.1", 5), x_edge_request_id="of-the-edge", x_forwarded_for="10.0.0.1")
    assert (await connection.answer(Edge(tells, TRUSTED, 100)))["edge_key"] != "of-the-edge"


def test_a_trusted_proxy_that_is_no_address_is_refused_at_the_start():
    with pytest.raises(ValueError, match="nginx"):
        Edge(tells, ("nginx",), 100)


async def test_what_is_no_request_passes_the_edge_untouched():
    seen: list[Any] = []

    async def notes(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([scope, receive, send])

    connection = Connection()
    scope: Scope = {"type": "lifespan", "asgi": {"version": "3.0"}}
    await Edge(notes, TRUSTED, 100)(scope, connection.receive, connection.send)
    assert seen == [{"type": "lifespan", "asgi": {"version": "3.0"}}, connection.receive, connection.send]


async def test_head_is_served_as_get():
    connection = Connection()
    connection.scope["method"] = "HEAD"

    async def method(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse(scope["method"])(scope, receive, send)

    assert await connection.answer(Edge(method, TRUSTED, 100)) == "GET"
    # The server's own scope stays, by which it leaves the body away.
    assert connection.scope["method"] == "HEAD"
