"""`python -m app tutorial`: the running stack shown at work, step by step, with the depths of its queues."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any
from uuid import uuid4

import httpx
import typer
from rich.console import Console
from rich.panel import Panel

from app.cli import terminal
from app.context import Context, open_context
from app.contracts import Backend, Charge, Queue, TaskName
from app.engine.identity import body_digest
from app.engine.record import FINAL
from app.settings import Settings
from app.telemetry import configure_logging

TIMEOUT = 120  # seconds that a step may take
POLL = 0.5  # seconds between two looks
BY = "tutorial"


class Stuck(Exception):  # noqa: N818  what it is
    """The stack did not do what a step shows."""


class Tutor:
    """What the steps share: clients of the stack, and how they tell what they see."""

    def __init__(self, context: Context, api: httpx.AsyncClient, console: Console) -> None:
        self.context = context
        self.api = api
        self.console = console

    def say(self, text: str) -> None:
        """Print a paragraph."""
        self.console.print(" ".join(text.split()))

    async def post(self, path: str, body: Any) -> dict[str, Any]:
        """Post JSON and answer the document. Raises `Stuck` for a refusal."""
        self.console.print(f"[bold]POST {path}[/] {str(body)[:100]}")
        response = await self.api.post(path, json=body)
        if response.is_error:
            raise Stuck(f"POST {path} was answered {response.status_code}: {response.text[:300]}")
        answer: dict[str, Any] = response.json()
        return answer

    async def submit(self, tasks: Sequence[dict[str, Any]]) -> list[str]:
        """Submit heavy tasks in one batch; answers their ids."""
        answer = await self.post("/api/async/batch", {"tasks": tasks})
        return [row["task_id"] for row in answer["results"] if "task_id" in row]

    async def conduct(self, backend: Backend, mode: str) -> None:
        """Have a part of the outside world behave otherwise."""
        url = f"{self.context.settings.outside_url}/conduct/{backend}"
        (await self.api.put(url, json={"mode": mode})).raise_for_status()
        self.console.print(f"[bold]PUT {url}[/] {mode}")

    async def ended(self, task_ids: Sequence[str]) -> list[dict[str, Any]]:
        """Show how deep the queues are until tasks have ended; answers their records."""
        shown, until = "", time.monotonic() + TIMEOUT
        while True:
            records = await self.context.store.records(list(task_ids))
            left = sum(record.get("status") not in FINAL for record in records)
            depths = await self.context.publisher.depths(Queue)
            waiting = "  ".join(f"{name} {depth}" for name, depth in depths.items())
            if (line := f"{len(task_ids) - left} of {len(task_ids)} done; waiting: {waiting}") != shown:
                self.console.print(f"  {line}")
                shown = line
            if not left:
                return [{**record, "task_id": one} for one, record in zip(task_ids, records, strict=True)]
            if time.monotonic() > until:
                raise Stuck("the tasks do not end; `make status` and `make logs s=worker` say more")
            await asyncio.sleep(POLL)

    async def workflow(self, workflow_id: str, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Show how the members of a workflow stand until `done` is true of its document."""
        shown, until = "", time.monotonic() + TIMEOUT
        while True:
            found: dict[str, Any] = (await self.api.get(f"/api/workflows/{workflow_id}")).json()
            members = {**found["members"], **{f"undo {n}": one for n, one in found["compensations"].items()}}
            line = "  ".join(f"{name} {_state(one)}" for name, one in members.items())
            if line != shown:
                self.console.print(f"  [bold]{found['status']}[/]  {line}")
                shown = line
            if done(found):
                return found
            if time.monotonic() > until:
                raise Stuck("the workflow does not come on; `make logs s=beat` says more")
            await asyncio.sleep(POLL)


def _state(member: dict[str, Any]) -> str:
    return f"{member['status']}({member['attempts']})" if member["attempts"] > 1 else str(member["status"])


def order(card: str = "tok_visa") -> dict[str, Any]:
    """An order that the outside world of the examples takes."""
    address = {"street": "1 Main Street", "city": "Springfield", "postcode": "12345", "country": "DE"}
    return {"sku": "lamp", "quantity": 1, "card": card, "email": "ada@example.org", "address": address}


async def queues(tutor: Tutor) -> None:
    """Queues: one a priority, so that urgent work does not wait behind the rest."""
    tutor.say(
        "Heavy work waits in three queues, heavy.high, heavy and heavy.low, and every heavy worker takes from all of "
        "them; light work has a queue and workers of its own. First come twelve of low priority, then two of high."
    )
    low = await tutor.submit([{"data": "x", "iterations": 1000, "priority": "low"}] * 12)
    high = await tutor.submit([{"data": "x", "iterations": 1000, "priority": "high"}] * 2)
    records = {record["task_id"]: record for record in await tutor.ended([*low, *high])}

    def slowest(ids: list[str]) -> float:
        return max(int(records[one]["finished_at"]) - int(records[one]["created_at"]) for one in ids) / 1000

    tutor.say(
        f"The last urgent one had ended {slowest(high):.1f} s after its submit, the last other {slowest(low):.1f} s."
    )


async def retries(tutor: Tutor) -> None:
    """Retries: what fails for now is tried again, later and later, until it works."""
    tutor.say(
        "An order calls four services over HTTP. Payment is broken now: its task fails, goes to RETRY, and the next "
        "attempt waits in RabbitMQ, not in a worker. The number in brackets is that of the attempt."
    )
    await tutor.conduct(Backend.PAYMENT, "broken")
    try:
        made = await tutor.post("/api/workflows/orders", order())
        await tutor.workflow(made["workflow_id"], lambda found: found["members"]["payment"]["attempts"] >= 2)  # noqa: PLR2004
    finally:
        await tutor.conduct(Backend.PAYMENT, "normal")
    tutor.say("Payment works again; nobody has to do anything.")
    found = await tutor.workflow(made["workflow_id"], lambda found: found["status"] in FINAL)
    tutor.say(f"The order is {found['status']}, and was charged once.")


async def chains(tutor: Tutor) -> None:
    """Chains: a workflow's members follow each other, and what fails takes back what was done."""
    tutor.say("The same order, undisturbed: each member begins once the one before has ended.")
    made = await tutor.post("/api/workflows/orders", order())
    await tutor.workflow(made["workflow_id"], lambda found: found["status"] in FINAL)
    tutor.say("And one whose payment is refused, which no further attempt would change: what was done is undone.")
    await tutor.conduct(Backend.PAYMENT, "refusing")
    try:
        made = await tutor.post("/api/workflows/orders", order())
        found = await tutor.workflow(made["workflow_id"], lambda found: found["status"] in FINAL)
    finally:
        await tutor.conduct(Backend.PAYMENT, "normal")
    tutor.say(f"{found['status']}: {(found['error'] or {}).get('message')}")


async def dead_letters(tutor: Tutor) -> None:
    """Dead letters: what failed for good is kept, and run again when its cause is mended."""
    tutor.say("A single task this time, a charge, while payment refuses everything.")
    await tutor.conduct(Backend.PAYMENT, "refusing")
    try:
        payload = Charge(amount=1200, card="tok_visa").model_dump()
        accepted = await tutor.context.tasks.submit(
            TaskName.CHARGE_PAYMENT, payload, task_id=str(uuid4()), digest=body_digest(payload), request_id=BY
        )
        await tutor.ended([accepted.task_id])
        letter = await _letter(tutor.context, accepted.task_id)
    finally:
        await tutor.conduct(Backend.PAYMENT, "normal")
    tutor.say(
        f"Its dead letter: id {letter['_id']}, reason {letter['reason']}, “{letter['error']['message']}”. "
        f"`python -m app dead-letters list` shows all, and this runs it again: `… replay {letter['_id']}`."
    )
    await tutor.context.replay(letter, by=BY)
    (record,) = await tutor.ended([accepted.task_id])
    tutor.say(f"The same id, {accepted.task_id}, is {record['status']} now: whoever waited for it sees it succeed.")


async def _letter(context: Context, task_id: str) -> dict[str, Any]:
    until = time.monotonic() + TIMEOUT
    while time.monotonic() < until:
        for letter in await context.letters.page(limit=20, before=None, state="open", name=None, queue=None):
            if letter["task_id"] == task_id:
                return letter
        await asyncio.sleep(POLL)
    raise Stuck("the dead letter does not come; `make logs s=beat` says more")


async def scaling(tutor: Tutor) -> None:
    """Scaling: more workers drain the same queue faster."""
    await _drain(tutor)
    tutor.say(
        "Start more workers, `make scale worker=3` (Docker: `docker compose up -d --scale celery_worker=6`), and run "
        "this step again: `python -m app tutorial scaling`. More processes than CPUs only help work that waits."
    )


async def _drain(tutor: Tutor) -> None:
    ids = await tutor.submit([{"data": "x", "iterations": 500}] * 40)
    began = time.monotonic()
    records = await tutor.ended(ids)
    workers = {record["worker"] for record in records}
    tutor.say(f"40 tasks by {len(workers)} worker(s), {40 / (time.monotonic() - began):.1f} a second.")


STEPS: dict[str, Callable[[Tutor], Awaitable[None]]] = {
    "queues": queues,
    "retries": retries,
    "chains": chains,
    "dead-letters": dead_letters,
    "scaling": scaling,
}


def tutorial(
    steps: Annotated[list[str] | None, typer.Argument(metavar="STEP…", help=f"Some of: {', '.join(STEPS)}.")] = None,
    url: Annotated[str | None, typer.Option(help="Where the stack answers; by default at NGINX_PORT.")] = None,
    key: Annotated[str | None, typer.Option(help="An API key, where the stack asks for one.", envvar="API_KEY")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not wait for Enter between steps.")] = False,
) -> None:
    """Show the running stack at work: queues, retries, chains, dead letters, scaling."""
    chosen = steps or list(STEPS)
    if unknown := set(chosen) - STEPS.keys():
        raise typer.BadParameter(f"there is no step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    settings = terminal.settings()
    configure_logging(settings.model_copy(update={"log_level": "ERROR"}))
    console = Console(highlight=False)
    base = url or f"http://127.0.0.1:{settings.nginx_port}"

    async def work() -> None:
        async with _tutor(settings, base, key, console) as tutor:
            for number, name in enumerate(chosen, start=1):
                console.print(
                    Panel((STEPS[name].__doc__ or name).strip(), title=f"{number} of {len(chosen)}", width=100)
                )
                await STEPS[name](tutor)
                if not yes and number < len(chosen) and sys.stdin.isatty():
                    await asyncio.to_thread(input, "Enter for the next step ")

    try:
        terminal.run(work())
    except Stuck as error:
        terminal.fail(str(error))
    except httpx.HTTPError as error:
        terminal.fail(f"{base} does not answer as expected; does the stack run? ({type(error).__name__}: {error})")


@asynccontextmanager
async def _tutor(settings: Settings, base: str, key: str | None, console: Console) -> AsyncIterator[Tutor]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with (
        open_context(settings, service=BY) as context,
        httpx.AsyncClient(base_url=base, headers=headers, timeout=30, trust_env=False) as api,
    ):
        yield Tutor(context, api, console)
