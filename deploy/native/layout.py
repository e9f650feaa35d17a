"""Where the native stack keeps its files, and what it remembers between two commands."""

import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import SecretStr

from app.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
# A unix socket's path holds 107 bytes, and supervisord first binds to its path with a dot and its process id added.
SOCKET_PATH_MAX = 95
MARKER = "made-by-make-run"


class StackError(Exception):
    """What went wrong and how to mend it, in one line; `details` are lines to show below it."""

    def __init__(self, message: str, *details: str) -> None:
        super().__init__(message)
        self.details = details


@dataclass(frozen=True)
class Layout:
    """The paths under STACK_DIR."""

    root: Path

    @classmethod
    def of(cls, settings: Settings) -> "Layout":
        """Return the layout of these settings; a relative STACK_DIR is one in the checkout."""
        return cls((ROOT / settings.stack_dir.expanduser()).resolve())

    @property
    def logs(self) -> Path:
        """One log a process, rotated by supervisord."""
        return self.root / "logs"

    @property
    def programs(self) -> Path:
        """One script a process: its environment and its command."""
        return self.root / "programs"

    @property
    def supervisord_conf(self) -> Path:
        """The list of processes."""
        return self.root / "supervisord.conf"

    @property
    def supervisord_pid(self) -> Path:
        """The file supervisord writes its process id to."""
        return self.root / "supervisord.pid"

    @property
    def state(self) -> Path:
        """What `State` keeps."""
        return self.root / "state.json"

    @property
    def socket(self) -> Path:
        """Where supervisord is spoken to."""
        inside = self.root / "supervisor.sock"
        if len(os.fsencode(inside)) <= SOCKET_PATH_MAX:
            return inside
        # Not TMPDIR: two terminals may have different ones, and must find the same socket.
        name = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:16]
        return Path("/tmp") / f"native-stack-{os.geteuid()}-{name}" / "supervisor.sock"  # noqa: S108

    def data(self, service: str) -> Path:
        """Return the directory a server keeps its data in."""
        return self.root / "data" / service

    def log(self, service: str) -> Path:
        """Return the log of one process."""
        return self.logs / f"{service}.log"

    def alive(self, service: str) -> Path:
        """Return the file that a worker or beat touches while it is well."""
        return self.root / "alive" / service

    def prepare(self) -> None:
        """Make the directories, readable by this user only. Raises StackError if STACK_DIR holds something else."""
        marker = self.root / MARKER
        try:
            if self.root.exists() and not marker.exists() and any(self.root.iterdir()):
                raise StackError(f"STACK_DIR={self.root} holds other files: name a directory that is empty or new")
            for path in (self.root, self.logs, self.programs, self.root / "alive"):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.root.chmod(0o700)
            marker.write_text("Written by `make run`, removed by `make clean`.\n")
        except OSError as error:
            raise StackError(f"STACK_DIR={self.root} cannot be used: {error.strerror}") from error
        if self.socket.parent != self.root:
            private_directory(self.socket.parent)

    def remove(self) -> None:
        """Remove everything. Raises StackError for a directory that `make run` did not make."""
        if not self.root.exists():
            return
        if not (self.root / MARKER).exists():
            raise StackError(f"{self.root} was not made by `make run`: it is left as it is")
        shutil.rmtree(self.root)
        if self.socket.parent != self.root:
            shutil.rmtree(self.socket.parent, ignore_errors=True)

    @contextmanager
    def lock(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Let one command at a time change the stack; `on_wait` is called once if another one is at work."""
        with (self.root / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def private_directory(path: Path) -> None:
    """Make a directory in a place others write to as well. Raises StackError if it is not this user's alone."""
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) != 0o700:  # noqa: PLR2004
        raise StackError(f"{path} is not a private directory of this user: remove it, or name a shorter STACK_DIR")


def as_environment(settings: Settings) -> dict[str, str]:
    """Return every setting as the environment variable it can be read from again."""

    def text(value: object) -> str:
        if isinstance(value, SecretStr):
            return value.get_secret_value()
        if isinstance(value, tuple):
            return ",".join(map(str, value))
        return str(value).lower() if isinstance(value, bool) else str(value)

    return {name.upper(): text(value) for name, value in settings if value is not None}


@dataclass
class State:
    """What the stack was started with: `scale` must leave all else as it is, whatever the environment is by then."""

    settings: dict[str, str]
    digests: dict[str, str]  # of the code that runs
    scaled: dict[str, int] = field(default_factory=dict)  # by `make scale`; `make down` forgets it

    @classmethod
    def load(cls, layout: Layout) -> "State | None":
        """Return what the last command wrote, if anything."""
        try:
            return cls(**json.loads(layout.state.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def save(self, layout: Layout) -> None:
        """Write it for the next command."""
        write_private(layout.state, json.dumps(asdict(self), indent=1))

    def restored(self) -> Settings:
        """Return the settings the stack runs with."""
        return Settings(**{name.lower(): value for name, value in self.settings.items()})  # type: ignore[arg-type]


def write_private(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace a file at once: a reader sees the old or the new text, and no other user sees either."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
    new.replace(path)
