"""What people see: a line a process, a waiting line on a terminal, plain lines elsewhere."""

import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.status import Status

from app.settings import Settings
from deploy.native.layout import StackError

STEPS = 4  # lines that stand for the progress bar where there is no terminal


class Output:
    """Lines for a person; colours and moving parts only on a terminal."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.errors = Console(file=sys.stderr, highlight=False, soft_wrap=True)

    def say(self, line: str = "") -> None:
        """Print a line as it is. Raises BrokenPipeError, which Rich would turn into a failure of the command."""
        print(line, file=self.console.file, flush=True)

    def check_reader(self) -> None:
        """Raise BrokenPipeError if nobody reads any more: without a new line no write would tell."""
        poll = select.poll()
        poll.register(self.console.file, 0)
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            raise BrokenPipeError

    def done(self, name: str, what: str) -> None:
        """Print that one thing is ready."""
        self.console.print(f"  [green]ok[/] {name:<11}{what}")

    def fail(self, error: StackError) -> None:
        """Print an error: its line, then what may help to understand it."""
        self.errors.print("[bold red]error:[/] ", end="")
        self.errors.print(str(error), markup=False)
        for line in error.details:
            self.errors.print(f"    {line}", markup=False, style="dim")

    def addresses(self, settings: Settings, seconds: float) -> None:
        """Print where everything is and what to do next."""
        at = f"http://127.0.0.1:{settings.nginx_port}"
        self.say()
        self.say(f"The stack runs ({seconds:.1f} s).")
        self.say(f"  API            {at}")
        self.say(f"  documentation  {at}/docs")
        self.say(f"  RabbitMQ       http://127.0.0.1:{settings.rabbitmq_management_port}  (guest, guest)")
        self.say("  next           make status, make logs s=api, make scale api=4 worker=3, make down")

    @contextmanager
    def waiting(self, what: str) -> Iterator[Status]:
        """Show on a terminal what is being waited for."""
        with self.console.status(what) as status:
            yield status

    @contextmanager
    def bar(self, title: str) -> Iterator["Bar"]:
        """Show a progress bar."""
        columns = (TextColumn("  {task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            yield Bar(self, progress, title)


class Bar:
    """A progress bar on a terminal, a few lines elsewhere."""

    def __init__(self, output: Output, progress: Progress, title: str) -> None:
        self.output, self.progress, self.title = output, progress, title
        self.task = progress.add_task(title, total=1)
        self.step = 0

    def show(self, fraction: float) -> None:
        """Show how much is done, 0 to 1."""
        self.progress.update(self.task, completed=fraction)
        step = int(fraction * STEPS)
        if step > self.step and not self.output.console.is_terminal:
            self.step = step
            self.output.say(f"  {self.title} {fraction:.0%}")
