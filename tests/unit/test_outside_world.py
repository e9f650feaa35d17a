from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.backends.outside import create_app
from app.settings import Settings

ADDRESS = {"street": "Main  Street 1", "city": " Berlin", "postcode": "10115", "country": "DE"}
KEY = {"Idempotency-Key": "k-1"}


@pytest.fixture
def world(settings: Settings, restored_logging: None) -> FastAPI:  # noqa: ARG001  wanted for what it undoes
    """The application without MongoDB: none of what is asked here reaches it."""
    app = create_app(settings)
    app.state.world = None
    return app


@pytest.fixture
async def outside(world: FastAPI, client_of: Callable[[Any], httpx.AsyncClient]) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(world) as client:
        yield client


def refusal(answer: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert (document["type"], document["status"]) == (f"urn:problem:{slug}", status)
    assert document["request_id"] == answer.headers["x-request-id"]
    return document


async def conduct(outside: httpx.AsyncClient, name: str, **fields: Any) -> None:
    assert (await outside.put(f"/conduct/{name}", json=fields)).status_code == 200


@pytest.mark.parametrize(
    ("sale", "tax"),
    [
        ({"amount": 1_050, "country": "DE"}, {"percent": 19, "tax": 200}),
        ({"amount": 1_000, "country": "FR"}, {"percent": 20, "tax": 200}),
        ({"amount": 1_000, "country": "AQ"}, {"percent": 0, "tax": 0}),
    ],
)
async def test_tax_is_in_whole_cents(outside: httpx.AsyncClient, sale: dict[str, Any], tax: dict[str, int]):
    assert (await outside.post("/tax/compute", json=sale)).json() == tax


@pytest.mark.parametrize(("amount", "score"), [(0, 0), (809_999, 80), (810_000, 81), (10**12, 100)])
async def test_the_fraud_score_follows_the_amount(outside: httpx.AsyncClient, amount: int, score: int):
    answer = await outside.post("/fraud/score", json={"amount": amount, "country": "DE"})
    assert answer.json() == {"score": score}


async def test_an_address_comes_back_tidy_and_an_unknown_country_is_refused(outside: httpx.AsyncClient):
    answer = await outside.post("/address/check", json=ADDRESS)
    assert answer.json() == {"street": "Main Street 1", "city": "Berlin", "postcode": "10115", "country": "DE"}
    refusal(await outside.post("/address/check", json={**ADDRESS, "country": "AQ"}), 422, "unknown-address")


async def test_a_parcel_costs_by_its_pieces_and_more_abroad(outside: httpx.AsyncClient):
    costs = [
        (await outside.post("/shipping/quote", json={"quantity": quantity, "country": country})).json()["cost"]
        for quantity, country in [(1, "DE"), (3, "DE"), (1, "FR")]
    ]
    assert costs == [590, 790, 1_490]
    refusal(await outside.post("/shipping/quote", json={"quantity": 1, "country": "AQ"}), 422, "unknown-address")


@pytest.mark.parametrize(("amount", "card"), [(500_001, "tok_4242"), (100, "tok_4000")])
async def test_a_charge_is_refused_past_the_limit_and_for_some_cards(
    outside: httpx.AsyncClient, amount: int, card: str
):
    answer = await outside.post("/payment/charge", json={"amount": amount, "card": card}, headers=KEY)
    refusal(answer, 402, "payment-refused")


@pytest.mark.parametrize("key", [None, "", "with space", "k" * 256])
async def test_what_changes_something_needs_a_key(outside: httpx.AsyncClient, key: str | None):
    headers = {} if key is None else {"Idempotency-Key": key}
    body = {"amount": 100, "card": "tok_4242"}
    refusal(await outside.post("/payment/charge", json=body, headers=headers), 422, "invalid")


async def test_a_cards_number_is_not_taken(outside: httpx.AsyncClient):
    answer = await outside.post("/payment/charge", json={"amount": 1, "card": "4242424242424242"}, headers=KEY)
    refusal(answer, 422, "invalid")


async def test_a_broken_service_answers_500_and_the_others_go_on(outside: httpx.AsyncClient):
    await conduct(outside, "tax", mode="broken")
    sale = {"amount": 100, "country": "DE"}
    refusal(await outside.post("/tax/compute", json=sale), 500, "broken")
    assert (await outside.post("/fraud/score", json=sale)).status_code == 200
    assert (await outside.get("/conduct")).json()["tax"]["calls"] == 1
    await conduct(outside, "tax", mode="normal")
    assert (await outside.post("/tax/compute", json=sale)).status_code == 200


async def test_a_refusing_service_refuses(outside: httpx.AsyncClient):
    await conduct(outside, "tax", mode="refusing")
    refusal(await outside.post("/tax/compute", json={"amount": 100, "country": "DE"}), 422, "refused")


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_slow_service_answers_all_the_same(outside: httpx.AsyncClient, when: str):
    await conduct(outside, "tax", mode="slow", seconds=0.01, when=when)
    assert (await outside.post("/tax/compute", json={"amount": 100, "country": "DE"})).json()["tax"] == 19


async def test_an_unknown_conduct_is_refused(outside: httpx.AsyncClient):
    refusal(await outside.put("/conduct/weather", json={}), 422, "invalid")
    refusal(await outside.put("/conduct/tax", json={"mode": "slow", "seconds": 61}), 422, "invalid")


async def test_production_has_no_switch(
    read_settings: Callable[..., Settings],
    client_of: Callable[[Any], httpx.AsyncClient],
    restored_logging: None,  # noqa: ARG001
):
    settings = read_settings(
        ENVIRONMENT="production",
        MONGODB_URL="mongodb://stack:long-enough-1@db/",
        REDIS_URL="redis://:long-enough-2@cache/0",
        RABBITMQ_URL="amqp://stack:long-enough-3@broker//",
        IDENTITY_SECRET="long-enough-4",
    )
    async with client_of(create_app(settings)) as client:
        refusal(await client.put("/conduct/tax", json={"mode": "broken"}), 404, "not-found")


async def test_a_request_keeps_its_callers_id(outside: httpx.AsyncClient):
    answer = await outside.post("/nowhere", headers={"X-Request-ID": "order-7"})
    assert refusal(answer, 404, "not-found")["request_id"] == "order-7"
    answer = await outside.post("/nowhere", headers={"X-Request-ID": "no id"})
    assert refusal(answer, 404, "not-found")["request_id"] != "no id"
