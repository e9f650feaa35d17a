"""What one process of the stack is: the command, its surroundings, and how one sees that it is well."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deploy.native.layout import ROOT

BACKENDS = ("outside", "service1", "service2")  # the applications beside the API, in app/backends


@dataclass(frozen=True)
class Service:
    """One process under supervisord."""

    name: str
    stage: int  # all of a stage are well before the next one starts
    command: tuple[str, ...]
    environment: Mapping[str, str]
    directory: Path
    is_well: Callable[[float], bool]  # given the time at which the process started
    ports: Mapping[str, int] = field(default_factory=dict)  # by the setting that moves it
    files: Mapping[Path, str] = field(default_factory=dict)  # its configuration
    digest: str = ""  # of the code it runs
    rereads: bool = False  # its configuration is read again on SIGHUP; otherwise a change of it restarts the process
    leaves_children: bool = False  # killed, it leaves processes behind that must end before it starts again
    complaint: str = ""  # marks the lines of its log that tell why it does not start, the first of them best
    start_seconds: int = 120  # a dozen start side by side, on what may be a small and busy machine
    stop_signal: str = "TERM"
    stop_seconds: int = 10
    address: str = ""

    @property
    def kind(self) -> str:
        """The name without its number."""
        return kind_of(self.name)


def kind_of(name: str) -> str:
    """Return a process's name without its number."""
    return name.rpartition("-")[0] or name


def digest_of(*paths: str) -> str:
    """Return a digest of files of the checkout; a directory stands for its Python files."""
    digest = hashlib.sha256()
    for path in (ROOT / name for name in paths):
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]
