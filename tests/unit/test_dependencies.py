from collections.abc import Callable
from types import SimpleNamespace

import pytest
from starlette.requests import Request

from app import problems
from app.api.dependencies import RequestIdentity
from app.engine.identity import ANYONE, Identity, Principal, identity_uuid
from app.settings import DEVELOPMENT_SECRET, Settings

KEY = "0123456789abcdef"

Identify = Callable[..., RequestIdentity]


@pytest.fixture
def identify(settings: Settings) -> Identify:
    """Make the identity of a request with a given Idempotency-Key."""

    def make(
        key: str | None,
        *,
        edge_key: str = "e" * 32,
        method: str = "POST",
        path: str = "/t",
        principal: Principal = ANYONE,
    ) -> RequestIdentity:
        context = SimpleNamespace(settings=settings)
        scope = {
            "type": "http",
            "method": method,
            "headers": [],
            "route": SimpleNamespace(path=path),
            "app": SimpleNamespace(state=SimpleNamespace(context=context)),
            "state": {"edge_key": edge_key},
        }
        return RequestIdentity(Request(scope), principal, key)

    return make


def test_the_clients_key_makes_the_id(identify: Identify):
    identity = identify(KEY)
    wanted = Identity("client", "anonymous", "POST /t", KEY)
    assert identity.from_client
    assert identity.id == identity_uuid(DEVELOPMENT_SECRET, wanted)
    assert identity.id == identify(KEY, edge_key="f" * 32).id


def test_without_one_the_edges_key_makes_the_id(identify: Identify):
    identity = identify(None, edge_key=KEY)
    wanted = Identity("edge", "anonymous", "POST /t", KEY)
    assert not identity.from_client
    assert identity.id == identity_uuid(DEVELOPMENT_SECRET, wanted)
    assert identity.id != identify(KEY).id
    assert identity.id != identify(None, edge_key="another").id


@pytest.mark.parametrize("key", [KEY, None])
def test_two_principals_never_meet(identify: Identify, key: str | None):
    principals = (ANYONE, Principal("a" * 24), Principal("b" * 24))
    assert len({identify(key, principal=principal).id for principal in principals}) == 3


@pytest.mark.parametrize("key", ["x", "x" * 15, "x" * 255])
def test_who_shares_with_nobody_may_use_short_keys(identify: Identify, key: str):
    assert identify(key, principal=Principal("a" * 24)).from_client


@pytest.mark.parametrize("key", ["", "x" * 256, "\t"])
def test_bounds_hold_for_every_principal(identify: Identify, key: str):
    with pytest.raises(problems.Invalid, match="Idempotency-Key: 1 to 255 printable ASCII"):
        identify(key, principal=Principal("a" * 24))


@pytest.mark.parametrize("key", [f'"{KEY}"', f" {KEY} ", f' "{KEY}"'])
def test_quotes_and_space_around_a_key_do_not_count(identify: Identify, key: str):
    assert identify(key).id == identify(KEY).id


def test_another_key_method_or_route_makes_another_id(identify: Identify):
    ids = [
        identify(KEY).id,
        identify(KEY.upper()).id,
        identify(KEY, method="PUT").id,
        identify(KEY, path="/other").id,
    ]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("key", ["x" * 16, "x" * 255, '"' + "x" * 255 + '"', "a b c d e f g h i", "~!@#$%^&*()_+{}|"])
def test_keys_within_bounds_are_taken(identify: Identify, key: str):
    assert identify(key).from_client


@pytest.mark.parametrize(
    "key",
    [
        "",
        '""',
        "x" * 15,
        '"' + "x" * 15 + '"',
        "x" * 256,
        "é" * 20,
        "€" * 20,
        "x" * 10 + "\t" + "x" * 10,
        "x" * 20 + "\x7f",
    ],
)
def test_keys_out_of_bounds_are_refused(identify: Identify, key: str):
    with pytest.raises(problems.Invalid, match="Idempotency-Key: 16 to 255 printable ASCII"):
        identify(key)


def test_only_a_repeat_that_the_client_made_is_called_one(identify: Identify):
    assert identify(KEY).replay_headers(replayed=True) == {"Idempotent-Replayed": "true"}
    assert identify(KEY).replay_headers(replayed=False) == {}
    assert identify(None).replay_headers(replayed=True) == {}
