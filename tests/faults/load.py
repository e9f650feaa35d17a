"""A steady, bounded load as clients make it, and the ledger of what they were told."""

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import httpx
from redis.exceptions import RedisError

from app import problems
from app.context import Context
from app.contracts import Queue

FINAL = frozenset({"SUCCESS", "FAILURE", "CANCELLED"})
PASSING = frozenset({502, 503, 504})  # may be answered while a server is away
TIMEOUT = 60  # seconds; above what nginx allows two tries, so that an answer that never comes is seen as such
IN_FLIGHT_MAX = 450  # nginx takes 500 of one address
REPEATS = 40
LONG_POLLS = 0.2  # of all polls
LONG_EVERY = 40  # submits: one that runs long enough to be interrupted
LONG, SHORT = 1500, 20  # iterations of about half a millisecond
EFFECT = {"steps": 10, "seconds": 0.05}


@dataclass(frozen=True)
class Rates:
    """Requests a second."""

    submits: float = 15
    polls: float = 30
    items: float = 10
    effects: float = 2


@dataclass
class Submission:
    """One task that a client wants, however often it has to ask."""

    request_id: str
    key: str | None
    ids: list[str] = field(default_factory=list)  # of each answer 202

    @property
    def task_id(self) -> str | None:
        """Its task, once it was accepted."""
        return self.ids[0] if self.ids else None


@dataclass
class Item:
    """One item that a client makes, changes and deletes."""

    name: str
    id: str | None = None
    patches_tried: int = 0
    patches_done: int = 0
    may_say: set[str] = field(default_factory=set)  # descriptions that it may have: the last told, and those unanswered
    delete_tried: bool = False
    deleted: bool = False


@dataclass
class Ledger:
    """What clients asked for and were told."""

    tag: str
    submissions: list[Submission] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    effects: set[str] = field(default_factory=set)  # accepted tasks whose effect can be counted
    finals: dict[str, dict[str, Any]] = field(default_factory=dict)  # the first final document seen of each task
    changed: set[str] = field(default_factory=set)  # tasks of which another final document was seen later
    unknown: set[str] = field(default_factory=set)  # accepted tasks whose status was 404
    errors: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)  # answers that no fault excuses
    requests: int = 0
    skipped: int = 0  # not sent, since too many were in flight
    slowest: float = 0.0  # seconds

    def accepted(self) -> list[str]:
        """The ids of all tasks that were accepted."""
        return [*(one.task_id for one in self.submissions if one.task_id), *self.effects]

    def saw(self, document: dict[str, Any]) -> None:
        """Note a status document; a second final one that differs is a second visible effect."""
        if document["status"] in FINAL:
            first = self.finals.setdefault(document["task_id"], document)
            if first != document:
                self.changed.add(document["task_id"])


def fault_of(answer: httpx.Response) -> str | None:
    """What is wrong with an error's form, if anything: it must be a problem document (RFC 9457)."""
    if answer.headers.get("content-type") != "application/problem+json":
        return f"{answer.status_code} is no problem document"
    document = answer.json()
    if not {"type", "title", "status", "detail", "instance", "request_id"} <= document.keys():
        return f"{answer.status_code} lacks a member"
    if document["status"] != answer.status_code:
        return f"{answer.status_code} says {document['status']}"
    if answer.status_code in PASSING and "retry-after" not in answer.headers:
        return f"{answer.status_code} without Retry-After"
    return None


class Load:
    """Clients at fixed rates: submits with and without a key, polls, and items made, changed, read and deleted.

    Tasks with an effect that can be counted have no route; they are submitted by `context`, as a replica would.
    """

    def __init__(self, url: str, ledger: Ledger, context: Context, rates: Rates | None = None) -> None:
        self.ledger = ledger
        self._url = url
        self._context = context
        self._rates = rates or Rates()
        self._tasks: set[asyncio.Task[None]] = set()
        self._recent: deque[str] = deque(maxlen=200)
        self._users = [self._user(number) for number in range(8)]
        self._stopping = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep the load up meanwhile; at the end every request gets its answer, and what has a key its task."""
        limits = httpx.Limits(max_connections=IN_FLIGHT_MAX, max_keepalive_connections=50)
        async with httpx.AsyncClient(base_url=self._url, timeout=TIMEOUT, limits=limits) as self._client:
            paces = [
                asyncio.create_task(self._pace(rate, start))
                for rate, start in (
                    (self._rates.submits, self._submit),
                    (self._rates.polls, self._poll),
                    (self._rates.items, self._step),
                    (self._rates.effects, self._effect),
                )
            ]
            try:
                yield
            finally:
                self._stopping = True
                for pace in paces:
                    pace.cancel()
                await asyncio.gather(*paces, return_exceptions=True)
                # A client that crashes is an error of this program, and is to be seen.
                await asyncio.gather(*self._tasks)
                for user in self._users:
                    await user.aclose()

    async def _pace(self, rate: float, start: Callable[[], Awaitable[None]]) -> None:
        due = time.monotonic()
        while True:
            due += 1 / rate
            await asyncio.sleep(due - time.monotonic())
            if len(self._tasks) >= IN_FLIGHT_MAX:
                self.ledger.skipped += 1
                continue
            task = asyncio.ensure_future(start())
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is None:
            self._tasks.discard(task)

    async def ask(self, method: str, path: str, expected: set[int], **options: Any) -> httpx.Response | None:
        """The answer if it is one of `expected`; else None, and the ledger knows why."""
        ledger = self.ledger
        ledger.requests += 1
        began = time.monotonic()
        try:
            answer = await self._client.request(method, path, **options)
        except httpx.TransportError as error:
            if isinstance(error, httpx.TimeoutException):
                ledger.wrong[f"{method}: no answer in {TIMEOUT} s"] += 1
            ledger.errors["refused" if isinstance(error, httpx.ConnectError) else type(error).__name__] += 1
            return None
        finally:
            ledger.slowest = max(ledger.slowest, time.monotonic() - began)
        if answer.status_code in expected:
            return answer
        slug = answer.json().get("type", "").removeprefix("urn:problem:") if answer.content[:1] == b"{" else ""
        ledger.errors[f"{answer.status_code} {slug}".strip()] += 1
        if fault := fault_of(answer):
            ledger.wrong[fault] += 1
        elif answer.status_code not in PASSING and not (answer.status_code == 409 and slug == "in-flight"):
            ledger.wrong[f"{method} {slug} {answer.status_code}"] += 1
        return None

    async def _submit(self) -> None:
        number = len(self.ledger.submissions)
        request_id = f"{self.ledger.tag}-{number}"
        one = Submission(request_id, uuid4().hex if number % 2 else None)
        self.ledger.submissions.append(one)
        if number % 4 == 3:
            path, body = "/api/async/count-words", {"text": f"{request_id} or perhaps not"}
        else:
            iterations = LONG if number % LONG_EVERY == 0 else SHORT
            priority = random.choice(("low", "normal", "high"))
            path, body = "/api/async/process", {"data": request_id, "iterations": iterations, "priority": priority}
        headers = {"X-Request-ID": request_id} | ({"Idempotency-Key": one.key} if one.key else {})
        for _ in range(REPEATS if one.key else 1):
            if answer := await self.ask("POST", path, {202}, json=body, headers=headers):
                one.ids.append(answer.json()["task_id"])
                self._recent.append(one.ids[0])
                if not one.key or number % 10 != 1 or len(one.ids) > 1:
                    return  # some clients did not hear the answer, and ask once more
            await asyncio.sleep(random.uniform(0.5, 1.5))

    async def _effect(self) -> None:
        task_id = str(uuid4())
        for _ in range(REPEATS):
            try:
                await self._context.tasks.submit(
                    "test.effect", EFFECT, task_id=task_id, digest="", request_id=task_id, queue=Queue.HEAVY
                )
            except (problems.Problem, RedisError):
                await asyncio.sleep(random.uniform(0.5, 1.5))
            else:
                self.ledger.effects.add(task_id)
                return

    async def _poll(self) -> None:
        if not self._recent:
            return
        task_id = random.choice(self._recent)
        wait = "?wait=5" if random.random() < LONG_POLLS else ""
        if answer := await self.ask("GET", f"/api/async/status/{task_id}{wait}", {200, 404}):
            if answer.status_code == 404:
                self.ledger.unknown.add(task_id)
            else:
                self.ledger.saw(answer.json())

    async def _step(self) -> None:
        if self._users:
            user = self._users.pop(0)
            await anext(user)
            self._users.append(user)

    async def _user(self, number: int) -> AsyncGenerator[None]:
        """One request a turn, one after the other: makes an item, changes it, reads it, deletes every other one."""
        turn = 0
        while True:
            turn += 1
            item = Item(f"{self.ledger.tag}-{number}-{turn}")
            self.ledger.items.append(item)
            async for _ in self._create(item, keyed=turn % 2 == 0):
                yield
            for patch in range(4 if item.id else 0):
                await self._patch(item, f"{patch}")
                yield
                if answer := await self.ask("GET", f"/api/items/{item.id}", {200}):
                    self._check(item, answer)
                yield
            while item.id and turn % 2 and not item.deleted:
                await self._delete(item)
                yield

    async def _create(self, item: Item, *, keyed: bool) -> AsyncIterator[None]:
        headers = {"Idempotency-Key": uuid4().hex} if keyed else {}
        body = {"name": item.name, "category": self.ledger.tag, "description": "new"}
        for _ in range(REPEATS if keyed else 1):
            if answer := await self.ask("POST", "/api/items", {201}, json=body, headers=headers):
                item.id = answer.json()["id"]
                item.may_say = {"new"}
                return
            yield

    async def _patch(self, item: Item, description: str) -> None:
        item.patches_tried += 1
        item.may_say.add(description)
        headers = {"Content-Type": "application/merge-patch+json"}
        body = f'{{"description": "{description}"}}'
        if answer := await self.ask("PATCH", f"/api/items/{item.id}", {200}, content=body, headers=headers):
            item.patches_done += 1
            if item.patches_done == item.patches_tried:
                item.may_say = {description}
            self._check(item, answer)

    async def _delete(self, item: Item) -> None:
        # The second time it may have been deleted by the first, whose answer was lost.
        expected = {204, 404} if item.delete_tried else {204}
        item.delete_tried = True
        if await self.ask("DELETE", f"/api/items/{item.id}", expected):
            item.deleted = True

    def _check(self, item: Item, answer: httpx.Response) -> None:
        said = answer.json()
        if said["name"] != item.name or said["description"] not in item.may_say:
            self.ledger.wrong["an item says what nobody wrote last"] += 1
