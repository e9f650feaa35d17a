"""What all groups need: to run a coroutine and tell of its errors, and to show rows to people and machines."""

import asyncio
import sys
from collections.abc import Coroutine, Iterable, Mapping
from datetime import datetime
from typing import Annotated, Any, NoReturn, TypeVar

import orjson
import typer
from pydantic import ValidationError
from pymongo.errors import PyMongoError
from redis.exceptions import RedisError
from rich.console import Console
from rich.table import Table

from app.settings import Settings, get_settings

T = TypeVar("T")

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def fail(message: str) -> NoReturn:
    """End the command with a line on standard error and exit code 1."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


def settings() -> Settings:
    """The settings; ends the command where one cannot be used, without telling its value."""
    try:
        return get_settings()
    except ValidationError as error:
        lines = [": ".join([*(str(part).upper() for part in one["loc"]), one["msg"]]) for one in error.errors()]
        fail(f"a setting cannot be used: {'; '.join(lines)}")


def run(work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; ends the command where a server does not answer."""
    try:
        return asyncio.run(work)
    except PyMongoError as error:
        fail(f"MongoDB does not answer; does the stack run? ({type(error).__name__})")
    except RedisError as error:
        fail(f"Redis does not answer; does the stack run? ({type(error).__name__})")


def show(rows: Iterable[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print rows as a table, or as a JSON array."""
    if as_json:
        show_json(list(rows))
        return
    listed = list(rows)
    # Nobody's terminal: no row may be cut or wrapped at the width of one.
    console = Console(width=None if sys.stdout.isatty() else 240, highlight=False, markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in listed[0] if listed else ():
        table.add_column(name, no_wrap=True)
    for row in listed:
        table.add_row(*(_text(value) for value in row.values()))
    if listed:
        console.print(table)


def show_json(value: Any) -> None:
    """Print a value as JSON; times in UTC (RFC 3339)."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_UTC_Z
    typer.echo(orjson.dumps(value, option=options).decode())


def _text(value: Any) -> str:
    match value:
        case None:
            return ""
        case datetime():
            return value.strftime("%Y-%m-%d %H:%M")
        case _:
            return str(value)
