"""One fault in the middle of a steady load: apply it, see the stack heal, and reckon."""

import asyncio
import json
import time
from collections import Counter
from datetime import datetime

import httpx

from app.context import open_context
from deploy.native.converge import is_well
from deploy.native.layout import State
from deploy.native.plan import Plan
from deploy.native.servers import find_tools
from deploy.native.supervision import Supervisor
from tests.faults.faults import Fault, Scene, SkippedError
from tests.faults.load import FINAL, Ledger, Load, Rates
from tests.faults.reconcile import reconcile
from tests.faults.report import Row
from tests.faults.witness import Stalls
from tests.integration.harness import Stack

BEFORE, AFTER = 3, 4  # seconds of load around fault and healing, times the factor
HEALED = 90  # seconds after which a stack is not waited for any longer; it is to need less than 30
CUT = frozenset({"refused", "RemoteProtocolError", "ReadError", "WriteError"})  # what a client sees of a dying nginx


async def trial(stack: Stack, fault: Fault, stalls: Stalls, *, factor: float = 1, rates: Rates | None = None) -> Row:
    """Apply one fault to a stack that is well, and tell what became of all that clients asked for.

    `factor` is of how long the load runs around the fault, and of how many malformed requests there are.
    """
    ledger = Ledger(tag=f"{time.time_ns():x}")
    scene, row = Scene(stack, factor), Row(fault.name)
    since = time.time()
    async with (
        open_context(stack.settings, service="load") as context,
        Load(stack.url, ledger, context, rates).running(),
    ):
        await asyncio.sleep(BEFORE * factor)
        scene.over()
        try:
            await asyncio.to_thread(fault.apply, scene)
        except SkippedError as reason:
            row.skipped = str(reason)
        row.recovered = await recovered(stack, scene.over_at)
        await asyncio.sleep(AFTER * factor)
    found = await reconcile(stack, ledger, poison=scene.poison, forgets=fault.forgets)
    row.requests, row.accepted = ledger.requests + scene.requests, len(ledger.accepted())
    row.lost, row.doubled = found.lost, found.doubled
    row.unarchived = len(found.unarchived) if fault.forgets else None
    row.errors, row.slowest = dict(ledger.errors), round(ledger.slowest, 2)
    row.wrong = dict(ledger.wrong + found.wrong + Counter(what for what, _ in scene.wrong))
    row.details = [f"{what}: {request}" for what, request in scene.wrong]
    if ledger.skipped:
        row.wrong["not sent, too many in flight"] = ledger.skipped
    for error, count in ledger.errors.items():
        if fault.flawless or (error[0].isalpha() and not (fault.cuts_clients and error in CUT)):
            row.wrong[error] = count
    row.block = _longest_block(stack, since, stalls)
    return row


async def recovered(stack: Stack, since: float) -> float | None:
    """Seconds from `since` until all processes are well and a heavy and a light task have run; None: not in time."""
    async with httpx.AsyncClient(base_url=stack.url, timeout=5) as client:
        while time.monotonic() - since < HEALED:
            if await asyncio.to_thread(well, stack) and await _serves(client):
                return time.monotonic() - since
            await asyncio.sleep(0.25)
    return None


def well(stack: Stack) -> bool:
    """Whether all processes are, by the probes of `make status`."""
    state = State.load(stack.layout)
    assert state is not None
    known = Supervisor(stack.layout).processes()
    services = Plan(state.restored(), stack.layout, find_tools(), state.digests, state.scaled).services()
    return all(is_well(one, known[one.name]) for one in services)


async def _serves(client: httpx.AsyncClient) -> bool:
    try:
        if (await client.get("/health")).json().get("status") != "healthy":
            return False
        for path, body in (
            ("/api/async/process", {"data": "probe", "iterations": 1, "priority": "high"}),
            ("/api/async/count-words", {"text": "probe"}),
        ):
            answer = await client.post(path, json=body)
            if answer.status_code != 202:
                return False
            while (await client.get(answer.headers["location"])).raise_for_status().json()["status"] not in FINAL:
                await asyncio.sleep(0.1)
        answer = await client.get("/api/items?limit=1")
    except httpx.HTTPError:
        return False
    return answer.status_code == 200


def _longest_block(stack: Stack, since: float, stalls: Stalls) -> int:
    """Milliseconds of the longest block of an event loop that was logged since, less what the machine stood still."""
    limit, longest = stack.settings.loop_block_warning * 1000, 0
    for path in stack.layout.logs.iterdir():
        for line in path.read_bytes().splitlines():
            if b'"event loop blocked"' in line:
                told = json.loads(line)
                moment = datetime.fromisoformat(told["timestamp"]).timestamp()
                block = round(told["ms"] - stalls.before(moment) * 1000)
                if moment > since and block > limit:
                    longest = max(longest, block)
    return longest
