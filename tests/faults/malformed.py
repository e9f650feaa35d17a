"""Requests that are not as they should be: by hand, byte by byte, and made by schemathesis from the API's document.

`python -m tests.faults.malformed http://127.0.0.1:8080 http://127.0.0.1:8101 1000` prints what was answered wrongly.
"""

import asyncio
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from typing import Any, Literal
from uuid import uuid4

import httpx
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

Expected = Literal["refused", "served", "either"]
Case = tuple[str, bytes, Expected]
Wrong = tuple[str, str]  # the kind of request with what is wrong, and the request

PATIENCE = 30  # seconds until a connection without an answer counts as hung; nginx gives up after 10
AT_ONCE = 16
SLOW = 20  # connections that send too slowly, in all
GENERATED = 10  # one in so many is schemathesis's, which takes ten times as long to make
# Unknown codings and versions of HTTP have statuses of their own (RFC 9112, section 6.1; RFC 9110, section 15.6.6).
OF_THE_PARSER = frozenset({501, 505})
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
TEXTS = (
    "",
    "x",
    "\x00",
    "\u202e",
    "😀" * 50,
    "a" * 5000,
    "' OR 1=1 --",
    "${jndi:x}",
    "../../etc/passwd",
    "%00",
    "$where",
    "NaN",
)
POSTS = ("/api/async/process", "/api/async/count-words", "/api/items")


def attack(url: str, replica: str, count: int) -> list[Wrong]:
    """Send `count` requests to `url`; answers those that were answered wrongly.

    Right is 4xx as a problem document, or a connection that is closed without an answer; never 5xx, never nothing.
    """
    document = httpx.get(f"{replica}/openapi.json").json()
    made, wrong = _generated(url, document, count // GENERATED)
    return wrong + asyncio.run(_send_all(url, list(cases(count - made))))


# By hand


def request(method: str, target: str, *headers: str, body: bytes = b"", length: bool = True) -> bytes:
    """A request as bytes; nothing of it is checked. It closes its connection unless a header says otherwise."""
    lines = [f"{method} {target} HTTP/1.1", "Host: api.test", "Connection: close", *headers]
    if length and body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body


def post(target: str, body: bytes, *headers: str) -> bytes:
    """A POST of JSON, or of what claims to be."""
    return request("POST", target, "Content-Type: application/json", *headers, body=body)


def cases(count: int) -> Iterator[Case]:
    """So many requests: each kind in turn, with other content each time."""
    kinds: list[Callable[[], Iterator[Case]]] = [_bodies, _heads, _framings, _targets, _spoofs, _fields, _pipelines]
    left = count
    while True:
        for kind in kinds:
            for case in kind():
                if not left:
                    return
                left -= 1
                yield case


def _bodies() -> Iterator[Case]:
    depth = random.choice((70, 1000, 50_000))
    texts: list[bytes] = [
        b"", b"{", b"[]", b"null", b"1", b'"x"', b"{}", b"\xef\xbb\xbf{}", b"<x/>", b"a=b&c=d",
        b'{"data": "\xff\xfe", "name": "\xc3\x28", "text": "\xed\xa0\x80"}',
        b"[" * depth, b'{"metadata":' * depth, b"[" * depth + b"]" * depth,
        b'{"name": "deep", "metadata": ' + b'{"a":' * depth + b"1" + b"}" * depth + b"}",
        b'{"data": "x", "iterations": NaN}', b'{"data": "x", "iterations": Infinity}',
        b'{"data": "x", "iterations": 1e999}',
        b'{"data": "x", "iterations": ' + b"9" * 5000 + b"}", b'{"data": "x", "iterations": -1}',
        b'{"data": "x", "iterations": "1"}', b'{"data": ["x"]}', b'{"data": null}', b'{"text": {}}', b'{"name": 1}',
        b'{"name": "x", "metadata": {"$where": 1}}', b'{"name": "x", "metadata": {"a.b": 1}}',
        b'{"name": "x", "metadata": {"a": 18446744073709551616}}', b'{"name": "x", "metadata": {"\\u0000": 1}}',
        b'{"name": "x", "metadata": {"a": "\\ud800"}}', b'{"name": "\\ud800"}', b'{"data": "\\udfff"}',
        random.randbytes(random.randint(1, 3000)), b"\x1f\x8b" + random.randbytes(50),
    ]  # fmt: skip
    for body in texts:
        yield "body", post(random.choice(POSTS), body), "refused"
    yield "another encoding", post(POSTS[0], '{"data": "x"}'.encode("utf-16")), "either"
    for text in random.sample(TEXTS, 3):
        field = json.dumps({"data": text, "text": text, "name": text, "iterations": 1}).encode()
        yield "text", post(random.choice(POSTS), field), "either"
    if random.random() < 0.1:
        yield "huge", post(random.choice(POSTS), b'{"data": "' + b"x" * 2_000_000), "refused"
    kind = random.choice(
        ("text/plain", "application/xml", "multipart/form-data", "multipart/form-data; boundary=", "x", "*/*")
    )
    yield "type", request("POST", random.choice(POSTS), f"Content-Type: {kind}", body=b'{"data": 1}'), "refused"
    yield "no body", request("POST", random.choice(POSTS), "Content-Type: application/json"), "refused"


def _heads() -> Iterator[Case]:
    for line in (
        "GET", "GET /", " GET /health HTTP/1.1", "get /health HTTP/1.1",
        "G\x00T /health HTTP/1.1",
        "GET /health HTTP/1.", "GET /health HTTP/9.9", "GET /health HTTP/2.0", "GET /health HTTP/1.1 x",
        "GET /health HTTQ/1.1",
        "GET health HTTP/1.1", "CONNECT api.test:443 HTTP/1.1", "TRACE / HTTP/1.1", "X" * 9000 + " / HTTP/1.1",
        "PROPFIND / HTTP/1.1", "\x16\x03\x01\x02", "PRI * HTTP/2.0",
    ):  # fmt: skip
        yield "first line", f"{line}\r\nHost: x\r\nConnection: close\r\n\r\n".encode("latin-1"), "refused"
    for header in ("no colon", "Space : x", ": empty", "Bad\x00Name: x", "Null: \x00", "Host: second"):
        yield "header", request("GET", "/health", header), "either"
    for header in (f"Large: {'x' * 40_000}", *[f"Cookie: {'c' * 9000}"]):
        yield "large header", request("GET", "/health", header), "refused"
    yield "many headers", request("GET", "/health", *(f"H{n}: {'v' * 40}" for n in range(1500))), "refused"
    yield "no host", b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n", "refused"
    yield "odd host", b"GET /health HTTP/1.1\r\nHost: a b\x00/\r\nConnection: close\r\n\r\n", "refused"
    yield "two spaces", b"GET  /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "either"
    yield "bare line feeds", b"GET /health/live HTTP/1.1\nHost: x\nConnection: close\n\n", "either"
    yield "cut off", request("GET", "/health")[: random.randint(1, 40)], "either"
    yield "noise", random.randbytes(random.randint(1, 400)) + b"\r\n\r\n", "refused"


def _framings() -> Iterator[Case]:
    body = b'{"data": "x", "iterations": 1}'
    for length in ("-1", "+5", "0x10", "1 1", "9" * 30, "5, 6", "", "abc", "1e2"):
        yield "length", request("POST", POSTS[0], f"Content-Length: {length}", body=body, length=False), "refused"
    yield "two lengths", request("POST", POSTS[0], "Content-Length: 3", body=body), "refused"
    yield "same length twice", request("POST", POSTS[0], f"Content-Length: {len(body)}", body=body), "refused"
    yield "length and chunked", request("POST", POSTS[0], "Transfer-Encoding: chunked", body=body), "refused"
    for coding in ("gzip", "chunked, chunked", "xchunked", "identity, x", "chunked\x0b", "\x0cchunked"):
        yield "coding", request("POST", POSTS[0], f"Transfer-Encoding: {coding}", body=body, length=False), "refused"
    for chunks in (
        b"zz\r\nxx\r\n0\r\n\r\n", b"-5\r\nhello\r\n0\r\n\r\n", b"5\r\nhel", b"ffffffffffffffff\r\nx",
        b"5\r\nhelloX\r\n0\r\n\r\n",
        b"5;" + b"e" * 20_000 + b"\r\nhello\r\n0\r\n\r\n", b"0\r\nBad\x00: x\r\n\r\n", b"0x5\r\nhello\r\n0\r\n\r\n",
        b"\r\n\r\n",
    ):  # fmt: skip
        head = request("POST", POSTS[0], "Content-Type: application/json", "Transfer-Encoding: chunked")
        yield "chunks", head + chunks, "refused"
    yield "expect", request("GET", "/health/live", "Expect: wonders"), "either"
    yield "upgrade", request("GET", "/health/live", "Upgrade: websocket", "Connection: upgrade, close"), "either"


def _targets() -> Iterator[Case]:
    for target in (
        "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/api/items/..%2f..%2fhealth", "/api/items/%00",
        "/api/items/%c0%af",
        "/api/items/%ff%fe", "/api/items/%", "/api/items/%zz", "//api//items//x", "/api/items/;x=1",
        "/api/items/" + "a" * 24,
        "/api/items/$ne", "/api/items/" + "0" * 23, "/api/items?limit=-1", "/api/items?limit=NaN",
        "/api/items?limit=" + "9" * 400,
        "/api/items?limit=1&limit=x", "/api/items?cursor=%00", "/api/items?category=",
        "/api/items?category=" + "c" * 101, "/api/async/status/" + "z" * 300, "/api/async/status/%0d%0aX-Injected:%201",
        "/api/async/tasks/{}", "/" + "a" * 9000, "/api/items?" + "q" * 9000, "/_problem", "/metrics", "/metrics/x",
        "/api/items/%E2%80%AE", "/\x7f", "/\u00e4", "/..", "/.git/config", "/api/service1/%2e%2e/x",
    ):  # fmt: skip
        yield "target", request("GET", target), "refused"
    yield "unknown query", request("GET", "/api/items?cursor[$ne]=1&limit=1"), "either"
    yield "injection", request("GET", "/health/live?%0d%0aX-Injected:%201"), "either"
    yield "absolute", request("GET", "http://elsewhere.test/health/live"), "either"
    yield "asterisk", request("OPTIONS", "*"), "refused"


def _spoofs() -> Iterator[Case]:
    # Believed, the second of two different items with one edge key would be refused.
    body = json.dumps({"name": f"spoof {uuid4().hex}", "category": "malformed"}).encode()
    yield "edge id", post("/api/items", body, "X-Edge-Request-Id: always-the-same"), "served"
    yield "edge id twice", post("/api/items", body, "X-Edge-Request-Id: a", "X-Edge-Request-Id: b"), "served"
    for header in (
        "X-Forwarded-For: 10.0.0.1, unknown, ::1", "X-Forwarded-For: " + "1.2.3.4, " * 300, "X-Forwarded-For: \x00",
        'Forwarded: for="[::1]";proto=https;host=evil', "X-Forwarded-Host: evil.test", "X-Forwarded-Proto: javascript",
        "X-Real-IP: 127.0.0.1", "X-Request-ID: " + "r" * 500, 'X-Request-ID: a"b', "X-Original-URL: /metrics",
        "X-HTTP-Method-Override: DELETE",
    ):  # fmt: skip
        yield "spoof", request("GET", "/health/live", header), "either" if "\x00" in header else "served"


def _fields() -> Iterator[Case]:
    body = json.dumps({"data": "x", "iterations": 1}).encode()
    for key in ("", "short", "k" * 300, "ключ" * 8, '"' * 20 + " ", "a\tb" * 10):
        yield "key", post(POSTS[0], body, f"Idempotency-Key: {key}"), "refused" if key != '"' * 20 + " " else "either"
    for name, value in (
        ("If-None-Match", '"' * 50), ("If-Match", "W/" * 99), ("Range", "bytes=9-1,2-"), ("Accept", "x/" * 500),
        ("Prefer", "wait=x"),
        ("Accept-Encoding", ";q=9"), ("Cookie", "=;=;"), ("Authorization", "Bearer \xff"), ("Last-Event-ID", "-1"),
        ("Date", "never"),
    ):  # fmt: skip
        yield "field", request("GET", f"/api/items/{'0' * 24}", f"{name}: {value}"), "refused"
    patch = request(
        "PATCH", f"/api/items/{'0' * 24}", "Content-Type: application/json", body=random.choice(TEXTS).encode() or b"{"
    )
    yield "patch", patch, "refused"


def _pipelines() -> Iterator[Case]:
    alive = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    yield "pipeline", alive * 5 + request("GET", "/nowhere"), "either"
    yield "pipeline with noise", alive + random.randbytes(30) + b"\r\n\r\n", "either"
    smuggled = b"0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    yield (
        "smuggled",
        request("POST", POSTS[0], "Transfer-Encoding: chunked", f"Content-Length: {len(smuggled)}") + smuggled,
        "refused",
    )


async def _send_all(url: str, todo: list[Case]) -> list[Wrong]:
    host, port = url.removeprefix("http://").split(":")
    gate, wrong = asyncio.Semaphore(AT_ONCE), list[Wrong]()

    async def one(case: Case) -> None:
        async with gate:
            await judge(case)

    async def judge(case: Case, *, slow: bool = False) -> None:
        name, data, expected = case
        try:
            answer = await asyncio.wait_for(_exchange(host, int(port), data, slow=slow), PATIENCE)
        except TimeoutError:
            wrong.append((f"{name}: no answer in {PATIENCE} s", repr(data[:300])))
            return
        if reason := _why_wrong(answer, expected):
            wrong.append((f"{name}: {reason}", repr(data[:300])))

    slow = [judge(("slow", post(POSTS[0], b"{}" * 50), "either"), slow=True) for _ in range(SLOW)]
    await asyncio.gather(*slow, *map(one, todo))
    return wrong


async def _exchange(host: str, port: int, data: bytes, *, slow: bool = False) -> bytes:
    """All that is answered until the other side closes; what it does not want to read is not sent."""
    reader, writer = await asyncio.open_connection(host, port)
    answer = b""
    with suppress(ConnectionError):
        if slow:
            for byte in data[: random.randint(1, len(data) - 1)][:20]:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.2)
        else:
            writer.write(data)
            if b"close" not in data:
                writer.write_eof()
    with suppress(ConnectionError):
        while part := await reader.read(65_536):
            answer += part
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    return answer


def _why_wrong(answer: bytes, expected: Expected) -> str:
    """What is wrong with all that a connection answered, "" if nothing is."""
    statuses = [int(status) for status in STATUS.findall(answer)]
    if not statuses:
        return "" if not answer or answer.startswith(b"{") else f"no HTTP: {answer[:100]!r}"  # HTTP/0.9 has no head
    reasons = {
        f"{statuses[-1]}": any(status >= 500 and status not in OF_THE_PARSER for status in statuses),
        "a header of the client's in the answer": b"x-injected" in answer.partition(b"\r\n\r\n")[0].lower(),
        f"{statuses} and not as many problem documents": answer.lower().count(b"application/problem+json")
        != sum(status >= 400 for status in statuses),
        f"served with {statuses[0]}": expected == "refused" and statuses[0] < 400,
        f"refused with {statuses[0]}": expected == "served" and statuses[0] >= 300,
    }
    return ", ".join(reason for reason, holds in reasons.items() if holds)


# By schemathesis


def _generated(url: str, document: dict[str, Any], count: int) -> tuple[int, list[Wrong]]:
    """Send cases that do not fit the document; some do by accident, and may be served."""
    schema = schemathesis.openapi.from_dict(document)
    operations = [result.ok() for result in schema.get_all_operations()]
    wrong: list[Wrong] = []
    sent = 0
    with requests.Session() as session:
        session.trust_env = False
        for operation in operations:
            each = max(1, count // len(operations))

            @settings(
                max_examples=each,
                deadline=None,
                database=None,
                print_blob=False,
                phases=(Phase.generate,),
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(GenerationMode.NEGATIVE))
            def send(case: schemathesis.Case) -> None:
                nonlocal sent
                sent += 1
                try:
                    answer = case.call(base_url=url, session=session, timeout=PATIENCE)
                except requests.Timeout:
                    wrong.append(("generated: no answer", f"{case.method} {case.path}"))
                except (requests.RequestException, ValueError):
                    return  # what the client's own library refuses to send, or a connection that was closed
                else:
                    kind = answer.headers.get("content-type", [""])[0]
                    if answer.status_code >= 500 or (answer.status_code >= 400 and kind != "application/problem+json"):
                        wrong.append((f"generated: {answer.status_code} {kind}", case.as_curl_command()[:300]))

            with suppress(Unsatisfiable):  # an operation whose every parameter is right
                send()
    return sent, wrong


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):  # libraries say things
        answered_wrongly = attack(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    sys.stdout.write(json.dumps(answered_wrongly, indent=1) + "\n")
