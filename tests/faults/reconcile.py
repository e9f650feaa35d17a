"""The reckoning: what clients were told against what the stack has, once it is at rest."""

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pymongo
import redis

from app.engine.record import FINISHED
from tests.faults.load import FINAL, Item, Ledger
from tests.integration.harness import Stack

END = 90  # seconds in which each accepted task must have ended, once the stack is well again
AT_ONCE = 16


@dataclass
class Reckoning:
    """What differs. `unarchived` are results that a Redis that lost its data took along."""

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    unarchived: list[str] = field(default_factory=list)
    wrong: Counter[str] = field(default_factory=Counter)


async def reconcile(stack: Stack, ledger: Ledger, *, poison: Iterable[str] = (), forgets: bool = False) -> Reckoning:
    """Compare the ledger with the stack; `forgets` where Redis lost what it held.

    A task that was accepted is lost if it has no final state, or the archive does not get it. It is doubled if it shows
    two different ends, or one request made two. An item is lost if it is not there although its making was answered, or
    does not say what was answered last; doubled if it is there twice, or was changed more often than anybody asked.
    """
    found = Reckoning()
    expected = dict.fromkeys(ledger.accepted(), "SUCCESS") | dict.fromkeys(poison, "FAILURE")
    statuses = await _ends(stack.url, list(expected), ledger)
    effects = await asyncio.to_thread(_archived_and_counted, stack, ledger.effects)
    found.doubled += [f"{task_id} had {count} effects" for task_id, count in effects.items() if count > 1]
    with pymongo.MongoClient[dict[str, Any]](stack.settings.mongodb_url.get_secret_value()) as client:
        database = client[stack.settings.mongodb_database]
        archive = await asyncio.to_thread(lambda: list(database["task_results"].find()))
        items = await asyncio.to_thread(lambda: list(database["items"].find({"category": ledger.tag})))
    ran = _ran(stack) if forgets else set()
    archived = {row["task_id"]: row for row in archive}
    for task_id, status in expected.items():
        end = statuses[task_id]
        if end == status and task_id in archived:
            continue
        if task_id in ran and end is None:
            found.unarchived.append(task_id)
        elif end in FINAL and task_id in archived:
            row = archived[task_id]
            found.wrong[f"{row['name']} ended {end} ({(row['error'] or {}).get('type')})"] += 1
        else:
            found.lost.append(f"{task_id} is {end}, {'' if task_id in archived else 'not '}archived")
    found.doubled += _doubled_tasks(ledger, archive, excused=ran)
    if not forgets and ledger.unknown:
        found.wrong["404 for the status of an accepted task"] += len(ledger.unknown)
    _compare_items(found, ledger.items, items)
    return found


async def _ends(url: str, task_ids: list[str], ledger: Ledger) -> dict[str, str | None]:
    """The state of each task once it is final or the time is up; None where nobody knows of it."""
    deadline = time.monotonic() + END
    gate = asyncio.Semaphore(AT_ONCE)

    async def end(client: httpx.AsyncClient, task_id: str) -> str | None:
        while True:
            async with gate:
                answer = await client.get(f"/api/async/status/{task_id}")
            status = answer.json()["status"] if answer.status_code == 200 else None
            if status in FINAL:
                ledger.saw(answer.json())
            if status in FINAL or time.monotonic() > deadline:
                return status
            await asyncio.sleep(0.5)

    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        return dict(zip(task_ids, await asyncio.gather(*(end(client, one) for one in task_ids)), strict=True))


def _archived_and_counted(stack: Stack, task_ids: Iterable[str]) -> dict[str, int]:
    """Wait until the archive has all that has ended, then count each task's effects."""
    deadline = time.monotonic() + END
    with redis.Redis.from_url(stack.settings.redis_url.get_secret_value()) as records:
        while records.xlen(FINISHED) and time.monotonic() < deadline:
            time.sleep(0.2)
        return {task_id: records.llen(f"effect:{task_id}") for task_id in task_ids}


def _ran(stack: Stack) -> set[str]:
    """Tasks that a worker's log says have ended well: their messages are gone with good reason."""
    ids = set()
    for name in {path.stem for path in stack.layout.logs.iterdir()}:
        if name.startswith(("heavy", "light")):
            for line in stack.log(name).splitlines():
                if '"task ran"' in line and '"SUCCESS"' in line:
                    ids.add(json.loads(line[line.index("{") :])["task_id"])
    return ids


def _doubled_tasks(ledger: Ledger, archive: list[dict[str, Any]], excused: set[str]) -> list[str]:
    made = defaultdict(set)
    for row in archive:
        # A submit that was answered 503 may leave the record of a task that was not run.
        if (row["error"] or {}).get("type") != "not_published":
            made[row["request_id"]].add(row["task_id"])
    doubled = [f"{task_id} ended twice" for task_id in sorted(ledger.changed - excused)]
    for row in archive:
        first = ledger.finals.get(row["task_id"])
        if first and row["task_id"] not in excused | ledger.changed:
            told = (first["status"], first["finished_at"])
            if told != (row["status"], row["finished_at"]):
                doubled.append(f"{row['task_id']} is archived as {row['status']} and was {first['status']}")
    for one in ledger.submissions:
        ids = made[one.request_id] | set(one.ids)
        if len(ids) > 1:
            doubled.append(f"{one.request_id} made {len(ids)} tasks")
    return doubled


def _compare_items(found: Reckoning, told: list[Item], there: list[dict[str, Any]]) -> None:
    rows = defaultdict(list)
    for row in there:
        rows[row["name"]].append(row)
    for item in told:
        matching = rows[item.name]
        if len(matching) > 1:
            found.doubled.append(f"item {item.name} is there {len(matching)} times")
        elif item.deleted and matching:
            found.lost.append(f"the deletion of item {item.name}")
        elif item.id and not matching and not item.delete_tried:
            found.lost.append(f"item {item.name}")
        elif item.id and matching:
            (row,) = matching
            changes = row["version"] - 1
            if row["description"] not in item.may_say or changes < item.patches_done:
                found.lost.append(f"a change of item {item.name}")
            if changes > item.patches_tried:
                found.doubled.append(f"item {item.name} changed {changes} times, asked {item.patches_tried}")
