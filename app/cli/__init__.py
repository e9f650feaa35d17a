"""What an operator does by hand: `python -m app <group> <command>`.

A group is a module of this package with a `typer.Typer`, and its line here. Commands end with 0 when it is done, 1 when
it was not (a line on standard error says why), 2 when they were called wrongly.
"""

import typer

from app.cli import api_keys, dead_letters, tutorial

app = typer.Typer(
    name="python -m app",
    help="Commands for who operates the stack. They read the settings that the stack reads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they print local variables, and one may be a secret
)
app.add_typer(api_keys.group, name="api-keys")
app.add_typer(dead_letters.group, name="dead-letters")
app.command()(tutorial.tutorial)


def main() -> None:
    """Run the command that the arguments name."""
    app()
