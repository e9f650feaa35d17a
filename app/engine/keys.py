"""API keys: made here, shown once, and checked at each request.

A key is `stack_<id>_<secret>`: the prefix lets scanners find one that leaked, the id is public and names its owner in
logs and records, the secret is 32 random bytes of which only a digest is kept.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

import structlog
from bson import ObjectId
from pymongo.errors import PyMongoError

from app import problems
from app.database import Document, KeyRepository
from app.engine.identity import Principal
from app.engine.quotas import Quota

log = structlog.get_logger(__name__)

PREFIX = "stack"
FORM = re.compile(PREFIX + r"_([0-9a-f]{24})_([0-9a-f]{64})")
ADMIN = "admin"

KNOWN_MAX = 4096  # keys that a process remembers
LOOKUP = 2.0  # seconds that MongoDB may take to tell of a key
PAUSE = 2.0  # seconds without asking MongoDB after it failed, so that few requests wait for it


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key that was checked: who it stands for, and its own quota if it has one."""

    principal: Principal
    quota: Quota | None


class Remembered(NamedTuple):
    """A key's document and when it was read, by the monotonic clock."""

    document: Document
    at: float


def new_key(
    name: str, *, admin: bool = False, expires_at: datetime | None = None, quota: Quota | None = None
) -> tuple[str, Document]:
    """A new key as its client sends it, and the document to keep, from which nobody can make the key."""
    key_id, secret = str(ObjectId()), secrets.token_hex(32)
    document = {
        "_id": key_id,
        "secret_hash": digest(secret),
        "name": name,
        "scopes": [ADMIN] if admin else [],
        "created_at": datetime.now(UTC),
        "expires_at": expires_at,
        "revoked_at": None,
        "quota": {"rate": quota.rate, "burst": quota.burst} if quota else None,
    }
    return f"{PREFIX}_{key_id}_{secret}", document


def digest(secret: str) -> str:
    """SHA-256 of a key's secret.

    A slow, salted hash is for passwords, which can be guessed. Nobody guesses 256 random bits, however fast the hash,
    and this one is paid at every request.
    """
    return hashlib.sha256(secret.encode()).hexdigest()


NOBODY = digest("")  # what an unknown id's secret is compared with: no secret has this digest


class KeyRing:
    """The keys as requests are checked against them, remembered for a short while.

    `cache` is for how many seconds MongoDB is not asked again, which is also how long a revoked key may still pass;
    `grace` for how many seconds a key passes whose document cannot be read again since MongoDB is away.
    """

    def __init__(self, keys: KeyRepository, *, cache: float, grace: float) -> None:
        self._keys = keys
        self._cache = cache
        self._grace = grace
        self._known: OrderedDict[str, Remembered] = OrderedDict()
        self._lookups: dict[str, asyncio.Task[Document | None]] = {}
        self._away_until = 0.0

    async def check(self, key: str) -> ApiKey:
        """The key that a client sent. Raises `Unauthorized`, and `Unavailable` where MongoDB cannot say."""
        form = FORM.fullmatch(key)
        if form is None:
            raise problems.Unauthorized("This is no API key.", error="invalid_token")
        key_id, secret = form.groups()
        document = await self._find(key_id)
        matches = hmac.compare_digest(document["secret_hash"] if document else NOBODY, digest(secret))
        if document is None or not matches:
            raise problems.Unauthorized("This API key is not known.", error="invalid_token")
        if document["revoked_at"]:
            raise problems.Unauthorized("This API key was revoked.", error="invalid_token")
        if document["expires_at"] and document["expires_at"] <= datetime.now(UTC):
            raise problems.Unauthorized("This API key has expired.", error="invalid_token")
        quota = Quota(**document["quota"]) if document["quota"] else None
        return ApiKey(Principal(key_id, admin=ADMIN in document["scopes"]), quota)

    async def _find(self, key_id: str) -> Document | None:
        known = self._known.get(key_id)
        now = time.monotonic()
        if known and now - known.at < self._cache:
            return known.document
        if now >= self._away_until:
            try:
                return await self._look_up(key_id)
            except (PyMongoError, TimeoutError) as error:
                self._away_until = time.monotonic() + PAUSE
                log.warning("API key not read, MongoDB cannot serve", error=f"{type(error).__name__}: {error}")
        if known and now - known.at < self._cache + self._grace:
            return known.document
        raise problems.Unavailable("MongoDB, which knows the API keys, does not answer; nothing was done.")

    async def _look_up(self, key_id: str) -> Document | None:
        # One query, however many requests of this key come while it runs.
        lookup = self._lookups.get(key_id)
        if lookup is None:
            lookup = self._lookups[key_id] = asyncio.create_task(self._read(key_id))
            lookup.add_done_callback(lambda _: self._lookups.pop(key_id))
        return await asyncio.shield(lookup)

    async def _read(self, key_id: str) -> Document | None:
        async with asyncio.timeout(LOOKUP):
            document = await self._keys.get(key_id)
        # Only keys that are there are remembered: whoever sends ids at random pushes none of them out.
        self._known.pop(key_id, None)
        if document is not None:
            self._known[key_id] = Remembered(document, time.monotonic())
            if len(self._known) > KNOWN_MAX:
                self._known.popitem(last=False)
        return document
