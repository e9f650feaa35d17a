"""Who may: the middleware in the assembled application, over keys that are handed to it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app import problems
from app.api.access import rate_limit_fields
from app.api.dependencies import AdminDep, PrincipalDep
from app.engine.identity import Principal
from app.engine.keys import ApiKey
from app.engine.quotas import Allowance, Quota, Quotas
from app.main import create_app
from app.settings import Settings

ClientOf = Callable[[Any], httpx.AsyncClient]
Make = Callable[..., FastAPI]

USER, ADMIN = Principal("a" * 24), Principal("b" * 24, admin=True)
KEYS = {"of-a-user": ApiKey(USER, None), "of-an-admin": ApiKey(ADMIN, Quota(1, 5))}


class Ring:
    async def check(self, key: str) -> ApiKey:
        if key not in KEYS:
            raise problems.Unauthorized("no", error="invalid_token")
        return KEYS[key]


class Buckets:
    def __init__(self) -> None:
        self.allowance: Allowance | None = None
        self.taken: list[tuple[str, Quota]] = []

    async def take(self, key_id: str, quota: Quota) -> Allowance | None:
        self.taken.append((key_id, quota))
        return self.allowance


@pytest.fixture
def make(read_settings: Callable[..., Settings], restored_logging: None) -> Make:  # noqa: ARG001
    def application(**environment: str) -> FastAPI:
        settings = read_settings(**environment)
        app = create_app(settings)
        app.state.context = SimpleNamespace(settings=settings, keys=Ring(), quotas=Buckets())

        @app.get("/api/me")
        async def me(principal: PrincipalDep) -> str:
            return principal.id

        @app.get("/api/secret")
        async def secret(admin: AdminDep) -> str:
            return admin.id

        return app

    return application


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_without_a_key_one_is_nobody_where_none_is_required(make: Make, client_of: ClientOf):
    async with client_of(make()) as client:
        assert (await client.get("/api/me")).json() == ""


async def test_a_key_names_who_asks(make: Make, client_of: ClientOf):
    async with client_of(make()) as client:
        assert (await client.get("/api/me", headers=bearer("of-a-user"))).json() == USER.id
        assert (await client.get("/api/me", headers={"Authorization": "bEARER  of-a-user "})).json() == USER.id


@pytest.mark.parametrize("credentials", ["Bearer wrong", "Bearer", "Bearer ", "Basic of-a-user", "of-a-user", ""])
async def test_a_bad_key_is_401_even_where_none_is_required(make: Make, client_of: ClientOf, credentials: str):
    async with client_of(make()) as client:
        response = await client.get("/api/me", headers={"Authorization": credentials})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    assert response.json()["type"] == "urn:problem:unauthorized"
    assert response.headers["x-request-id"] == response.json()["request_id"]


@pytest.mark.parametrize("path", ["/api/me", "/api/secret", "/api/items", "/nowhere", "/healthy", "/docs/"])
async def test_where_a_key_is_required_all_but_the_open_paths_ask_for_it(make: Make, client_of: ClientOf, path: str):
    async with client_of(make(API_KEYS_REQUIRED="true")) as client:
        response = await client.get(path)
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")


@pytest.mark.parametrize(
    "path", ["/", "/health/live", "/docs", "/redoc", "/openapi.json", "/static-offline-docs/swagger-ui.css"]
)
async def test_open_paths_ask_nobody_and_look_at_no_key(make: Make, client_of: ClientOf, path: str):
    async with client_of(make(API_KEYS_REQUIRED="true")) as client:
        assert (await client.get(path)).status_code == 200
        assert (await client.get(path, headers=bearer("wrong"))).status_code == 200


async def test_the_body_of_who_may_not_is_not_judged(make: Make, client_of: ClientOf):
    async with client_of(make(API_KEYS_REQUIRED="true")) as client:
        assert (await client.post("/api/items", content=b"{")).status_code == 401


async def test_admin_calls_need_a_key_of_admin_scope(make: Make, client_of: ClientOf):
    async with client_of(make()) as client:
        nobody = await client.get("/api/secret")
        user = await client.get("/api/secret", headers=bearer("of-a-user"))
        admin = await client.get("/api/secret", headers=bearer("of-an-admin"))
    assert (nobody.status_code, nobody.headers["www-authenticate"]) == (401, "Bearer")
    assert (user.status_code, user.json()["type"]) == (403, "urn:problem:forbidden")
    assert user.headers["www-authenticate"] == 'Bearer error="insufficient_scope", scope="admin"'
    assert (admin.status_code, admin.json()) == (200, ADMIN.id)


async def test_a_key_has_its_own_quota_or_that_of_all(make: Make, client_of: ClientOf):
    app = make(QUOTA_RATE="7", QUOTA_BURST="9")
    async with client_of(app) as client:
        await client.get("/api/me", headers=bearer("of-a-user"))
        await client.get("/api/me", headers=bearer("of-an-admin"))
        await client.get("/api/me")
        await client.get("/health/live", headers=bearer("of-a-user"))
    assert app.state.context.quotas.taken == [(USER.id, Quota(7, 9)), (ADMIN.id, Quota(1, 5))]


async def test_every_answer_to_a_counted_request_tells_the_quota(make: Make, client_of: ClientOf):
    app = make(QUOTA_RATE="2", QUOTA_BURST="9")
    app.state.context.quotas.allowance = Allowance(passes=True, left=4, wait=1)
    async with client_of(app) as client:
        for path, status in (("/api/me", 200), ("/api/secret", 403), ("/api/nowhere", 404)):
            response = await client.get(path, headers=bearer("of-a-user"))
            assert response.status_code == status
            assert response.headers["ratelimit-policy"] == '"default";q=9;w=5'
            assert response.headers["ratelimit"] == '"default";r=4;t=1'
        assert "ratelimit" not in (await client.get("/api/me")).headers


async def test_past_the_quota_429_says_when_to_come_back(make: Make, client_of: ClientOf):
    app = make(QUOTA_RATE="0.1", QUOTA_BURST="1")
    app.state.context.quotas.allowance = Allowance(passes=False, left=0, wait=8)
    async with client_of(app) as client:
        response = await client.get("/api/me", headers=bearer("of-a-user"))
    assert response.status_code == 429
    assert response.json()["type"] == "urn:problem:quota-exceeded"
    assert response.headers["ratelimit"] == '"default";r=0;t=8'
    assert 8 <= int(response.headers["retry-after"]) <= 12


@pytest.mark.parametrize(
    ("quota", "policy"),
    [
        (Quota(1, 1), '"default";q=1;w=1'),
        (Quota(3, 100), '"default";q=100;w=34'),
        (Quota(0.5, 10), '"default";q=10;w=20'),
        (Quota(1e-300, 2), '"default";q=2;w=172800'),
        (Quota(float("inf"), 1000), '"default";q=1000;w=1'),
    ],
)
def test_the_window_is_what_an_empty_bucket_takes_to_fill(quota: Quota, policy: str):
    fields = rate_limit_fields(quota, Allowance(passes=True, left=0, wait=1))
    assert fields == {"ratelimit-policy": policy, "ratelimit": '"default";r=0;t=1'}


async def test_no_limit_asks_no_redis():
    no_redis = SimpleNamespace(register_script=lambda _: None)
    assert await Quotas(no_redis, timeout=1).take("a", Quota(0, 5)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(("required", "calls"), [("false", [{}, {"apiKey": []}]), ("true", [{"apiKey": []}])])
def test_the_document_says_which_calls_take_a_key(make: Make, required: str, calls: list[Any]):
    document = make(API_KEYS_REQUIRED=required).openapi()
    scheme = document["components"]["securitySchemes"]["apiKey"]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    assert document["paths"]["/api/items"]["get"]["security"] == calls
    assert document["paths"]["/api/secret"]["get"]["security"] == [{"apiKey": []}]
    assert {"401", "429"} <= document["paths"]["/api/items"]["get"]["responses"].keys()
    assert {"401", "403"} <= document["paths"]["/api/secret"]["get"]["responses"].keys()
    assert "403" not in document["paths"]["/api/items"]["get"]["responses"]
    live = document["paths"]["/health/live"]["get"]
    assert "security" not in live
    assert "401" not in live["responses"]


PREFLIGHT = {
    "Origin": "https://app.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, idempotency-key",
}


async def test_without_origins_no_other_page_is_let_in(make: Make, client_of: ClientOf):
    async with client_of(make()) as client:
        responses = [await client.options("/api/me", headers=PREFLIGHT), await client.get("/api/me", headers=PREFLIGHT)]
    assert not [name for response in responses for name in response.headers if name.startswith("access-control")]


async def test_named_origins_may_send_keys_and_read_what_limits_say(make: Make, client_of: ClientOf):
    app = make(CORS_ORIGINS="https://app.example, https://other.example", API_KEYS_REQUIRED="true")
    async with client_of(app) as client:
        preflight = await client.options("/api/me", headers=PREFLIGHT)  # browsers send no key with it
        refused = await client.get("/api/me", headers={"Origin": "https://other.example"})
        stranger = await client.get("/api/me", headers={"Origin": "https://evil.example"})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    assert "Authorization" in preflight.headers["access-control-allow-headers"]
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://other.example"
    exposed = {name.strip() for name in refused.headers["access-control-expose-headers"].split(",")}
    assert {"Retry-After", "Location", "ETag", "X-Request-ID", "RateLimit", "RateLimit-Policy"} <= exposed
    assert "access-control-allow-origin" not in stranger.headers
    for response in (preflight, refused, stranger):
        assert "access-control-allow-credentials" not in response.headers


async def test_every_origin_at_most_without_credentials(make: Make, client_of: ClientOf):
    async with client_of(make(CORS_ORIGINS="*")) as client:
        response = await client.get("/api/me", headers={"Origin": "https://app.example", "Cookie": "a=b"})
    assert "access-control-allow-credentials" not in response.headers
