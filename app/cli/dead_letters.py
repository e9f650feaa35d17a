"""`python -m app dead-letters`: list, show, replay and discard what failed for good."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Annotated, Any

import typer
from bson import ObjectId
from bson.errors import InvalidId
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from app import problems
from app.cli import terminal
from app.context import Context, open_context
from app.telemetry import configure_logging

LISTED_MAX = 1_000
AT_ONCE = 50  # letters in work: enough to keep the broker busy
BY = "cli"


class State(StrEnum):
    """What may be listed."""

    OPEN = "open"
    REPLAYED = "replayed"
    DISCARDED = "discarded"
    ANY = "any"


group = typer.Typer(help="List, show, replay and discard what failed for good.", no_args_is_help=True)

Task = Annotated[str | None, typer.Option(help="Only those of this task.")]
Queue = Annotated[str | None, typer.Option(help="Only those of this queue.")]
Ids = Annotated[list[str] | None, typer.Argument(metavar="ID…", help="As the list has them.")]
All = Annotated[bool, typer.Option("--all", help="All open ones, of --task and --queue where these are given.")]


@group.command("list", epilog="Example:\n\npython -m app dead-letters list --task heavy.process_data")
def show_list(
    task: Task = None,
    queue: Queue = None,
    state: Annotated[State, typer.Option(help="What was done with them.")] = State.OPEN,
    limit: Annotated[int, typer.Option(min=1, max=LISTED_MAX, help="How many, the latest first.")] = 20,
    as_json: terminal.Json = False,
) -> None:
    """List dead letters, the latest first."""

    async def read() -> list[dict[str, Any]]:
        async with _context() as context:
            wanted = None if state is State.ANY else state.value
            return await context.letters.page(limit=limit, before=None, state=wanted, name=task, queue=queue)

    shown = ("task_id", "died_at", "state", "name", "queue", "reason", "attempts")
    rows = [
        {"id": str(row["_id"]), **{name: row[name] for name in shown}, "error": row["error"]["message"]}
        for row in terminal.run(read())
    ]
    if not as_json:
        if not rows:
            typer.echo("no such dead letter", err=True)
        rows = [{**row, "error": row["error"].split("\n")[0][:60]} for row in rows]
    terminal.show(rows, as_json=as_json)


@group.command(epilog="Example:\n\npython -m app dead-letters show 665f1c2ab8d94e0f7a3b5c1d")
def show(letter_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Show all of one dead letter, as JSON."""

    async def read() -> dict[str, Any] | None:
        async with _context() as context:
            return await context.letters.get(_id(letter_id))

    row = terminal.run(read())
    if row is None:
        terminal.fail(f"there is no dead letter with the id {letter_id!r}")
    terminal.show_json({"id": str(row.pop("_id")), **row})


@group.command(
    epilog="Examples:\n\npython -m app dead-letters replay 665f1c2ab8d94e0f7a3b5c1d\n\n"
    "python -m app dead-letters replay --all --task heavy.process_data"
)
def replay(
    ids: Ids = None, everything: All = False, task: Task = None, queue: Queue = None, as_json: terminal.Json = False
) -> None:
    """Run tasks, and handle events, again, each under its own id. What is refused for now stays open: call it again."""

    async def one(context: Context, row: dict[str, Any]) -> str:
        return "replayed" if await context.replay(row, by=BY) else "already settled"

    _each(one, ids, everything=everything, task=task, queue=queue, as_json=as_json)


@group.command(epilog="Example:\n\npython -m app dead-letters discard --all --queue light")
def discard(
    ids: Ids = None, everything: All = False, task: Task = None, queue: Queue = None, as_json: terminal.Json = False
) -> None:
    """Let tasks be: they stay failed, and their letters expire in time."""

    async def one(context: Context, row: dict[str, Any]) -> str:
        return "discarded" if await context.letters.settle(row["_id"], "discarded", by=BY) else "already settled"

    _each(one, ids, everything=everything, task=task, queue=queue, as_json=as_json)


def _each(
    act: Callable[[Context, dict[str, Any]], Awaitable[str]],
    ids: list[str] | None,
    *,
    everything: bool,
    task: str | None,
    queue: str | None,
    as_json: bool,
) -> None:
    """Do `act` with letters, a progress bar on the terminal; ends with 1 where one was refused."""
    if bool(ids) == everything:
        raise typer.BadParameter("give either ids or --all")

    async def work() -> Counter[str]:
        outcomes: Counter[str] = Counter()
        async with _context() as context:
            rows = _open(context, task, queue) if everything else _named(context, ids or [], outcomes)
            total = await context.letters.count(name=task, queue=queue) if everything else len(ids or [])
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with Progress(*columns, console=Console(stderr=True)) as progress:
                bar = progress.add_task("dead letters", total=total)
                async for batch in rows:
                    for outcome in await asyncio.gather(*(_outcome(act, context, row) for row in batch)):
                        outcomes[outcome] += 1
                        progress.advance(bar)
        return outcomes

    outcomes = terminal.run(work())
    if as_json:
        terminal.show_json(outcomes)
    else:
        typer.echo(", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()) or "nothing to do")
    if set(outcomes) - {"replayed", "discarded", "already settled"}:
        raise typer.Exit(1)


async def _outcome(
    act: Callable[[Context, dict[str, Any]], Awaitable[str]], context: Context, row: dict[str, Any]
) -> str:
    try:
        return await act(context, row)
    except problems.Problem as problem:
        return problem.detail


async def _open(context: Context, task: str | None, queue: str | None) -> AsyncIterator[list[dict[str, Any]]]:
    before = None
    while rows := await context.letters.page(limit=AT_ONCE, before=before, state="open", name=task, queue=queue):
        yield rows
        before = rows[-1]["_id"]


async def _named(context: Context, ids: list[str], outcomes: Counter[str]) -> AsyncIterator[list[dict[str, Any]]]:
    for letter_id in ids:
        row = await context.letters.get(_id(letter_id))
        if row is None:
            outcomes[f"not found: {letter_id}"] += 1
        else:
            yield [row]


@asynccontextmanager
async def _context() -> AsyncIterator[Context]:
    settings = terminal.settings().model_copy(update={"mongodb_pool_min": 0, "log_level": "ERROR"})
    configure_logging(settings)
    async with open_context(settings, service="cli") as context:
        yield context


def _id(text: str) -> ObjectId:
    try:
        return ObjectId(text)
    except InvalidId:
        terminal.fail(f"{text!r} is no id of a dead letter")
