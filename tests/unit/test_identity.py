from dataclasses import replace
from uuid import RFC_4122, UUID

import pytest

from app.engine.identity import Identity, body_digest, identity_uuid

SECRET = "a-secret-of-the-tests"
IDENTITY = Identity(origin="client", principal="anonymous", route="POST /api/items", key="0123456789abcdef")


def test_the_same_request_has_the_same_id():
    assert identity_uuid(SECRET, IDENTITY) == identity_uuid(SECRET, replace(IDENTITY))


def test_the_id_does_not_change_between_releases():
    # Clients repeat a request after a deployment, too. By hand: HMAC-SHA-256 over the compact JSON list of the parts.
    assert identity_uuid(SECRET, IDENTITY) == "b17cb239-bea6-86db-8dde-0afc6a583288"


@pytest.mark.parametrize("key", [f"{number:016}" for number in range(64)])
def test_the_id_is_a_uuid_of_version_8(key: str):
    text = identity_uuid(SECRET, replace(IDENTITY, key=key))
    uuid = UUID(text)
    assert text == str(uuid)
    assert uuid.variant == RFC_4122  # the variant of RFC 9562, which came after it
    assert uuid.version == 8


@pytest.mark.parametrize(
    "other",
    [
        replace(IDENTITY, origin="edge"),
        replace(IDENTITY, principal="somebody"),
        replace(IDENTITY, route="PUT /api/items"),
        replace(IDENTITY, key="0123456789abcdeF"),
        # The parts are not merely joined.
        replace(IDENTITY, principal="anonymousPOST", route=" /api/items"),
        replace(IDENTITY, row=0),
    ],
)
def test_another_part_makes_another_id(other: Identity):
    assert identity_uuid(SECRET, other) != identity_uuid(SECRET, IDENTITY)


def test_rows_of_a_batch_have_ids_of_their_own():
    # A key that ends in a digit does not meet the rows of a shorter one.
    identities = [
        replace(IDENTITY, key=key, row=row) for key in (IDENTITY.key, IDENTITY.key + "1") for row in range(12)
    ]
    assert len({identity_uuid(SECRET, identity) for identity in identities}) == 24


def test_another_secret_makes_another_id():
    assert identity_uuid(SECRET + "!", IDENTITY) != identity_uuid(SECRET, IDENTITY)


def test_the_digest_does_not_depend_on_the_order_of_keys():
    first = {"name": "x", "metadata": {"a": 1, "b": [{"c": 2, "d": 3}]}}
    second = {"metadata": {"b": [{"d": 3, "c": 2}], "a": 1}, "name": "x"}
    assert list(first) != list(second)
    assert body_digest(first) == body_digest(second)


@pytest.mark.parametrize(
    "other", [{"a": [1, 3]}, {"a": [2, 1]}, {"a": ["1", 2]}, {"A": [1, 2]}, {"a": [1, 2], "b": None}, {}]
)
def test_the_digest_depends_on_everything_else(other: dict[str, object]):
    assert body_digest(other) != body_digest({"a": [1, 2]})
