"""`python -m app api-keys`: make, list and revoke API keys."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from app.cli import terminal
from app.context import open_database
from app.database import Document, KeyRepository
from app.engine.keys import new_key
from app.engine.quotas import Quota
from app.settings import BURST_MAX

LISTED_MAX = 10_000
DAYS_MAX = 36_500

EXAMPLES = {
    "create": [
        "python -m app api-keys create --name me --admin",
        "KEY=$(python -m app api-keys create --name shop --expires 90)",
    ],
    "list": ["python -m app api-keys list", "python -m app api-keys list --json"],
    "revoke": ["python -m app api-keys revoke 665f1c2ab8d94e0f7a3b5c1d"],
}

group = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)


def _examples(command: str) -> str:
    return "Examples:\n\n" + "\n\n".join(EXAMPLES[command])


@group.command(epilog=_examples("create"))
def create(
    name: Annotated[str, typer.Option(help="Whose key it is, for the list.")],
    admin: Annotated[bool, typer.Option("--admin", help="Let it do what only operators may.")] = False,
    expires: Annotated[
        int | None, typer.Option(min=1, max=DAYS_MAX, metavar="DAYS", help="Days after which it ends by itself.")
    ] = None,
    quota_rate: Annotated[
        float | None, typer.Option(min=0, help="Requests a second, instead of QUOTA_RATE; 0 sets no limit.")
    ] = None,
    quota_burst: Annotated[
        int | None, typer.Option(min=1, max=BURST_MAX, help="Requests at once, instead of QUOTA_BURST.")
    ] = None,
    as_json: terminal.Json = False,
) -> None:
    """Make a key and print it: the only time that it is shown. It holds from now on."""
    settings = terminal.settings()
    quota = None
    if quota_rate is not None or quota_burst is not None:
        quota = Quota(
            settings.quota_rate if quota_rate is None else quota_rate,
            settings.quota_burst if quota_burst is None else quota_burst,
        )
        if not quota.rate and quota_burst is not None:
            raise typer.BadParameter("a burst limits nothing without a rate: give --quota-rate, too")
    ends = None if expires is None else datetime.now(UTC) + timedelta(days=expires)
    key, document = new_key(name, admin=admin, expires_at=ends, quota=quota)

    async def add() -> None:
        async with _keys() as keys:
            await keys.add(document)

    terminal.run(add())
    if as_json:
        terminal.show_json({**_row(document), "key": key})
        return
    typer.echo(f"The key of {name!r}, id {document['_id']}. It is not shown again.", err=True)
    typer.echo(key)


@group.command("list", epilog=_examples("list"))
def show(as_json: terminal.Json = False) -> None:
    """List all keys, also those that no longer hold; never a key itself."""

    async def read() -> list[Document]:
        async with _keys() as keys:
            return await keys.all(LISTED_MAX)

    rows = [_row(document) for document in terminal.run(read())]
    if not as_json:
        rows = [{**row, "scopes": ",".join(row["scopes"]), "quota": _quota(row["quota"])} for row in rows]
    terminal.show(rows, as_json=as_json)


@group.command(epilog=_examples("revoke"))
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id, as the list has it.")],
    as_json: terminal.Json = False,
) -> None:
    """End a key's use, within API_KEYS_CACHE seconds everywhere. A second time changes nothing."""

    async def end() -> Document | None:
        async with _keys() as keys:
            return await keys.revoke(key_id)

    document = terminal.run(end())
    if document is None:
        terminal.fail(f"there is no key with the id {key_id!r}")
    if as_json:
        terminal.show_json(_row(document))
        return
    typer.echo(f"The key of {document['name']!r} was revoked at {document['revoked_at']:%Y-%m-%d %H:%M:%S} UTC.")


@asynccontextmanager
async def _keys() -> AsyncIterator[KeyRepository]:
    # One connection is enough for one call.
    settings = terminal.settings().model_copy(update={"mongodb_pool_min": 0})
    async with open_database(settings, name="cli") as database:
        yield KeyRepository(database)


def _row(document: Document) -> dict[str, Any]:
    shown = ("name", "scopes", "created_at", "expires_at", "revoked_at", "quota")
    return {"id": document["_id"], **{name: document[name] for name in shown}}


def _quota(quota: dict[str, Any] | None) -> str:
    return f"{quota['rate']:g}/s, {quota['burst']} at once" if quota else ""
