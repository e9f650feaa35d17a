import asyncio
import hmac
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pymongo.errors import AutoReconnect

from app import problems
from app.engine import keys
from app.engine.identity import Principal
from app.engine.keys import KeyRing, digest, new_key
from app.engine.quotas import Quota

OTHER_SECRET = "0" * 64


class Repository:
    """Stands in for the collection: counts what it is asked, and fails or hangs when it is told to."""

    def __init__(self, *documents: dict[str, Any]) -> None:
        self.documents = {document["_id"]: document for document in documents}
        self.asked = 0
        self.away = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def get(self, key_id: str) -> dict[str, Any] | None:
        self.asked += 1
        await self.gate.wait()
        if self.away:
            raise AutoReconnect("away")
        return self.documents.get(key_id)


class Clock:
    """The monotonic clock of the module under test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(keys, "time", clock)
    return clock


def ring(repository: Repository) -> KeyRing:
    return KeyRing(repository, cache=30, grace=300)  # type: ignore[arg-type]


def test_a_key_says_its_id_and_is_kept_as_a_digest_alone():
    key, document = new_key("me", admin=True, quota=Quota(2, 3))
    prefix, key_id, secret = key.split("_")
    assert prefix == "stack"
    assert document["_id"] == key_id
    assert len(bytes.fromhex(secret)) == 32
    assert document["secret_hash"] == digest(secret)
    assert secret not in str(document)
    assert (document["scopes"], document["quota"]) == (["admin"], {"rate": 2, "burst": 3})


def test_no_two_keys_share_a_part():
    made = [new_key("same")[0].split("_") for _ in range(100)]
    assert len({key_id for _, key_id, _ in made}) == len({secret for _, _, secret in made}) == 100


async def test_a_key_stands_for_its_principal_and_quota():
    key, document = new_key("me", quota=Quota(2, 3))
    known = await ring(Repository(document)).check(key)
    assert (known.principal, known.quota) == (Principal(document["_id"]), Quota(2, 3))
    admin_key, admin = new_key("root", admin=True)
    known = await ring(Repository(admin)).check(admin_key)
    assert (known.principal, known.quota) == (Principal(admin["_id"], admin=True), None)


async def test_a_wrong_secret_an_unknown_id_and_a_malformed_key_are_refused():
    key, document = new_key("me")
    stranger, _ = new_key("nobody")
    checked = ring(Repository(document))
    malformed = ["", "x", key[:-1], key + "0", key.upper(), "other" + key[5:], key.replace("_", "-"), f" {key}"]
    for wrong in (f"stack_{document['_id']}_{OTHER_SECRET}", stranger, *malformed):
        with pytest.raises(problems.Unauthorized) as refusal:
            await checked.check(wrong)
        assert refusal.value.headers == {"www-authenticate": 'Bearer error="invalid_token"'}


async def test_revoked_and_expired_keys_are_refused_and_say_so_to_their_holder_alone():
    key, document = new_key("me", expires_at=datetime.now(UTC) - timedelta(seconds=1))
    with pytest.raises(problems.Unauthorized, match="has expired"):
        await ring(Repository(document)).check(key)
    document["revoked_at"] = datetime.now(UTC)
    with pytest.raises(problems.Unauthorized, match="was revoked"):
        await ring(Repository(document)).check(key)
    with pytest.raises(problems.Unauthorized, match="not known"):
        await ring(Repository(document)).check(f"stack_{document['_id']}_{OTHER_SECRET}")


async def test_a_key_that_has_not_expired_passes():
    key, document = new_key("me", expires_at=datetime.now(UTC) + timedelta(days=1))
    assert (await ring(Repository(document)).check(key)).principal.id == document["_id"]


@pytest.mark.parametrize("verdict", [True, False])
async def test_compare_digest_alone_decides_and_is_asked_for_unknown_ids_too(
    monkeypatch: pytest.MonkeyPatch, verdict: bool
):
    compared: list[tuple[str, str]] = []

    def compare(left: str, right: str) -> bool:
        compared.append((left, right))
        return verdict

    monkeypatch.setattr(hmac, "compare_digest", compare)
    key, document = new_key("me")
    stranger, _ = new_key("nobody")
    checked = ring(Repository(document))
    outcomes = []
    for one in (key, f"stack_{document['_id']}_{OTHER_SECRET}", stranger):
        try:
            await checked.check(one)
        except problems.Unauthorized:
            outcomes.append(False)
        else:
            outcomes.append(True)
    assert outcomes == [verdict, verdict, False]
    assert len(compared) == 3
    assert all(len(part) == 64 for pair in compared for part in pair)


async def test_mongodb_is_asked_once_until_the_cache_is_over(clock: Clock):
    key, document = new_key("me")
    repository = Repository(document)
    checked = ring(repository)
    for _ in range(5):
        await checked.check(key)
    clock.now += 29.9
    await checked.check(key)
    assert repository.asked == 1
    repository.documents[document["_id"]] = {**document, "revoked_at": datetime.now(UTC)}
    clock.now += 0.1
    with pytest.raises(problems.Unauthorized):
        await checked.check(key)
    assert repository.asked == 2


async def test_requests_of_one_key_at_once_are_one_query():
    key, document = new_key("me")
    repository = Repository(document)
    repository.gate.clear()
    checked = ring(repository)
    waiting = [asyncio.create_task(checked.check(key)) for _ in range(50)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting[0].cancel()  # one client goes away; the others' query goes on
    repository.gate.set()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert {answer.principal.id for answer in answers[1:]} == {document["_id"]}
    assert repository.asked == 1


async def test_unknown_ids_are_never_remembered():
    key, document = new_key("new")
    repository = Repository()
    checked = ring(repository)
    with pytest.raises(problems.Unauthorized):
        await checked.check(key)
    repository.documents[document["_id"]] = document
    assert (await checked.check(key)).principal.id == document["_id"]


async def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keys, "KNOWN_MAX", 3)
    made = [new_key(str(number)) for number in range(5)]
    repository = Repository(*(document for _, document in made))
    checked = ring(repository)
    for key, _ in made:
        await checked.check(key)
    assert repository.asked == 5
    await checked.check(made[4][0])
    assert repository.asked == 5
    await checked.check(made[0][0])
    assert repository.asked == 6


async def test_known_keys_pass_for_a_while_without_mongodb_and_unknown_ones_get_503(clock: Clock):
    key, document = new_key("known")
    stranger, other = new_key("unknown")
    repository = Repository(document, other)
    checked = ring(repository)
    await checked.check(key)
    repository.away = True
    clock.now += 31
    await checked.check(key)
    with pytest.raises(problems.Unavailable):
        await checked.check(stranger)
    assert repository.asked == 2  # not again so soon after it failed
    clock.now += 298
    await checked.check(key)
    clock.now += 1
    with pytest.raises(problems.Unavailable):
        await checked.check(key)
    repository.away = False
    clock.now += keys.PAUSE
    await checked.check(key)
    await checked.check(stranger)


async def test_a_mongodb_that_hangs_is_waited_for_briefly(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keys, "LOOKUP", 0.01)
    key, document = new_key("me")
    repository = Repository(document)
    repository.gate.clear()
    with pytest.raises(problems.Unavailable):
        await ring(repository).check(key)


async def test_a_wrong_secret_does_not_pass_without_mongodb_either(clock: Clock):
    key, document = new_key("known")
    repository = Repository(document)
    checked = ring(repository)
    await checked.check(key)
    repository.away = True
    clock.now += 31
    with pytest.raises(problems.Unauthorized):
        await checked.check(f"stack_{document['_id']}_{OTHER_SECRET}")
