"""What the API tells of the services behind the gateway, asked over real connections."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.api import gateway
from app.settings import Settings

ClientOf = Callable[[Any], httpx.AsyncClient]


@asynccontextmanager
async def service(answer: bytes | None) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Something that listens: its address and the requests it got. It says `answer`, or nothing and hangs for None."""
    requests: list[bytes] = []
    writers = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        requests.append(await reader.readuntil(b"\r\n\r\n"))
        if answer is not None:
            writer.write(answer)
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", requests
    finally:
        server.close()
        for writer in writers:
            writer.close()


def said(document: object, status: str = "200 OK") -> bytes:
    body = json.dumps(document).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def ask(app: FastAPI, client_of: ClientOf, settings: Settings, path: str = "status") -> Any:
    async with gateway.watch(settings) as app.state.gateway, client_of(app) as client:
        return (await client.get(f"/api/gateway/{path}")).raise_for_status().json()


@pytest.mark.parametrize(
    ("answer", "health", "status"),
    [
        (said({"status": "healthy"}), "healthy", "degraded"),
        (said({"status": "degraded"}), "degraded", "degraded"),
        (said({"status": "unhealthy"}, "503 Service Unavailable"), "unhealthy", "unhealthy"),
        (said({"status": "healthy"}, "404 Not Found"), "broken", "unhealthy"),
        (said({"status": "fine"}), "broken", "unhealthy"),
        (said({"status": ["healthy"]}), "broken", "unhealthy"),
        (said(["healthy"]), "broken", "unhealthy"),
        (b"no HTTP at all\r\n\r\n", "broken", "unhealthy"),
        (b"", "broken", "unhealthy"),
        (None, "slow", "unhealthy"),
    ],
)
async def test_what_a_service_says_is_told(  # noqa: PLR0913, PLR0917
    app: FastAPI, client_of: ClientOf, settings: Settings, answer: bytes | None, health: str, status: str
):
    async with service(answer) as (address, _):
        away = {"service1_url": address, "service2_url": "http://127.0.0.1:1", "health_timeout": 0.3}
        told = await ask(app, client_of, settings.model_copy(update=away))
    assert told["services"] == {"service1": health, "service2": "unreachable"}
    assert told["status"] == status
    assert told["timestamp"].endswith("Z")


async def test_all_well_is_healthy_and_many_questions_cost_one(app: FastAPI, client_of: ClientOf, settings: Settings):
    async with service(said({"status": "healthy"})) as (address, requests):
        both = settings.model_copy(update={"service1_url": f"{address}/", "service2_url": address, "health_cache": 60})
        async with gateway.watch(both) as app.state.gateway, client_of(app) as client:
            answers = await asyncio.gather(*(client.get("/api/gateway/status") for _ in range(20)))
            listed = (await client.get("/api/gateway/services")).json()
    assert {answer.json()["status"] for answer in answers} == {"healthy"}
    assert [line.split()[:2] for line in requests] == [[b"GET", b"/health"]] * 2
    assert listed == [
        {"name": "service1", "title": "Orders", "prefix": "/api/service1", "health": "healthy"},
        {"name": "service2", "title": "Fulfilment", "prefix": "/api/service2", "health": "healthy"},
    ]
    assert address.removeprefix("http://") not in json.dumps(listed)


async def test_after_a_while_they_are_asked_again(app: FastAPI, client_of: ClientOf, settings: Settings):
    async with service(said({"status": "healthy"})) as (address, requests):
        both = settings.model_copy(update={"service1_url": address, "service2_url": address, "health_cache": 0.01})
        async with gateway.watch(both) as app.state.gateway, client_of(app) as client:
            await client.get("/api/gateway/status")
            await asyncio.sleep(0.05)
            await client.get("/api/gateway/status")
    assert len(requests) == 4
