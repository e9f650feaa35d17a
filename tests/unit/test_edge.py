from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import orjson
import pytest
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from app.api.edge import BodyLimit, Edge

TRUSTED = ("10.0.0.0/8", "127.0.0.1", "fd00::/8")
LIMIT = 10

ClientOf = Callable[[Any], httpx.AsyncClient]


async def tells(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer what Edge says of the request."""
    await JSONResponse(scope["state"])(scope, receive, send)


async def echoes(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer how the body came."""
    chunks, more = [], True
    while more:
        message = await receive()
        assert message["type"] == "http.request"
        chunks.append(message.get("body", b"").decode())
        more = message.get("more_body", False)
    await JSONResponse({"body": "".join(chunks), "chunks": len(chunks)})(scope, receive, send)


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
    return (await connection.answer(Edge(tells, TRUSTED)))["edge_key"]


@pytest.mark.parametrize("given", ["a", "Az09._-", "x" * 64, "7e324e54-153a-8efa-8e48-4085fddbe031"])
async def test_a_well_formed_request_id_is_kept(given: str):
    connection = Connection(x_request_id=given)
    assert (await connection.answer(Edge(tells, TRUSTED)))["request_id"] == given
    assert connection.header(b"x-request-id") == [given.encode()]


@pytest.mark.parametrize("given", ["", " ", "x" * 65, "a b", "a\n", "a/b", "é", "a;b", '"a"', "a\0"])
async def test_a_malformed_request_id_is_replaced(given: str):
    connection = Connection(x_request_id=given)
    made = (await connection.answer(Edge(tells, TRUSTED)))["request_id"]
    assert len(made) == 32
    assert made.isalnum()
    assert connection.header(b"x-request-id") == [made.encode()]


async def test_every_request_without_an_id_gets_its_own():
    edge = Edge(tells, TRUSTED)
    first, second = await Connection().answer(edge), await Connection().answer(edge)
    assert len({first["request_id"], first["edge_key"], second["request_id"], second["edge_key"]}) == 4


async def test_the_response_has_the_id_once_whatever_the_application_says(client_of: ClientOf):
    async def talkative(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse({}, headers={"X-Request-ID": "of-the-handler"})(scope, receive, send)

    async with client_of(Edge(talkative, TRUSTED)) as client:
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
    assert (await connection.answer(Edge(tells, ())))["edge_key"] != "of-the-edge"


async def test_the_forwarding_headers_do_not_change_who_is_trusted():
    connection = Connection(client=("11.0.0.1", 5), x_edge_request_id="of-the-edge", x_forwarded_for="10.0.0.1")
    assert (await connection.answer(Edge(tells, TRUSTED)))["edge_key"] != "of-the-edge"


def test_a_trusted_proxy_that_is_no_address_is_refused_at_the_start():
    with pytest.raises(ValueError, match="nginx"):
        Edge(tells, ("nginx",))


async def test_what_is_no_request_passes_the_edge_untouched():
    seen: list[Any] = []

    async def notes(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([scope, receive, send])

    connection = Connection()
    connection.scope["type"] = "lifespan"
    before = dict(connection.scope)
    await Edge(BodyLimit(notes, LIMIT), TRUSTED)(connection.scope, connection.receive, connection.send)
    assert seen == [before, connection.receive, connection.send]


def limited(app: Any = echoes) -> Edge:
    return Edge(BodyLimit(app, LIMIT), TRUSTED)


async def test_a_body_of_a_told_length_within_the_limit_passes():
    connection = Connection(b"01234", b"56789", content_length="10")
    assert await connection.answer(limited()) == {"body": "0123456789", "chunks": 2}


async def test_a_request_without_a_body_passes():
    assert await Connection(b"").answer(limited()) == {"body": "", "chunks": 1}


@pytest.mark.parametrize("chunks", [[b"0123456789"], [b"0123", b"", b"456789"], [b""], [b"0"] * 10])
async def test_a_chunked_body_within_the_limit_passes_unchanged(chunks: list[bytes]):
    connection = Connection(*chunks, transfer_encoding="chunked")
    assert (await connection.answer(limited()))["body"] == b"".join(chunks).decode()


async def test_after_a_chunked_body_the_application_still_hears_of_a_disconnect():
    async def waits(scope: Scope, receive: Receive, send: Send) -> None:
        kinds = [(await receive())["type"], (await receive())["type"]]
        await JSONResponse(kinds)(scope, receive, send)

    connection = Connection(b"01", b"23", transfer_encoding="chunked")
    assert await connection.answer(limited(waits)) == ["http.request", "http.disconnect"]


async def never(_scope: Scope, _receive: Receive, _send: Send) -> None:
    pytest.fail("the application must not see this request")


@pytest.mark.parametrize(
    "connection",
    [
        lambda: Connection(b"0123456789a", content_length="11"),
        lambda: Connection(content_length="99999999999999999999"),
        # A length that is told beside chunks is not the one that counts.
        lambda: Connection(b"0123456789a", content_length="1", transfer_encoding="chunked"),
        lambda: Connection(b"0123456789a", transfer_encoding="chunked"),
        lambda: Connection(b"01234", b"56789", b"a", transfer_encoding="chunked"),
        lambda: Connection(b"01234", b"", b"56789a", b"", transfer_encoding="gzip, chunked"),
    ],
)
async def test_a_body_over_the_limit_is_refused(connection: Callable[[], Connection]):
    refused = connection()
    problem = await refused.answer(limited(never))
    assert refused.status == problem["status"] == 413
    assert problem["type"] == "urn:problem:body-too-large"
    assert problem["instance"] == "/here"
    assert refused.header(b"content-type") == [b"application/problem+json"]
    assert refused.header(b"x-request-id") == [problem["request_id"].encode()]
    # The rest of the body is not read, so the connection cannot serve another request.
    assert refused.header(b"connection") == [b"close"]


async def test_an_endless_body_is_not_read_to_its_end():
    connection = Connection(*[b"01234"] * 1000, transfer_encoding="chunked")
    await connection.answer(limited(never))
    assert len(connection.incoming) == 997


async def test_limits_hold_over_a_client(client_of: ClientOf):
    async def chunks(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b"01234"

    async with client_of(limited()) as client:
        within = await client.post("/", content=chunks(2))
        over = await client.post("/", content=chunks(3))
        told = await client.post("/", content=b"0123456789a")
    assert within.json()["body"] == "0123401234"
    assert (within.status_code, over.status_code, told.status_code) == (200, 413, 413)
