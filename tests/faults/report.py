"""The table: a row a fault, as Markdown for people and JSON for programs."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

HEAD = (
    "fault", "requests", "accepted", "lost", "doubled", "not archived", "errors by status", "seconds to recover",
    "longest loop block, ms",
)  # fmt: skip


@dataclass
class Row:
    """What one fault did. `lost` and `doubled` name tasks and items."""

    fault: str
    requests: int = 0
    accepted: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    unarchived: int | None = None  # results that Redis forgot before the archive had them; None where it forgot nothing
    errors: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, int] = field(default_factory=dict)  # answers, and ends of tasks, that no fault excuses
    details: list[str] = field(default_factory=list)  # of `wrong`, for whoever mends it
    recovered: float | None = None  # seconds; None: not within the bound
    block: int = 0  # ms
    slowest: float = 0.0  # seconds of the slowest answer
    skipped: str = ""  # why this fault could not be had

    @property
    def good(self) -> bool:
        """Whether nothing was lost, doubled or answered wrongly, and the stack healed."""
        return not (self.lost or self.doubled or self.wrong) and self.recovered is not None

    def cells(self) -> list[str]:
        """The row as text, in the order of `HEAD`."""
        if self.skipped:
            return [self.fault, f"left out: {self.skipped}", *[""] * (len(HEAD) - 2)]
        errors = {**self.errors, **{f"WRONG {what}": count for what, count in self.wrong.items()}}
        return [
            self.fault,
            f"{self.requests:,}",
            f"{self.accepted:,}",
            f"{len(self.lost)}",
            f"{len(self.doubled)}",
            "" if self.unarchived is None else f"{self.unarchived}",
            ", ".join(f"{what}: {count:,}" for what, count in sorted(errors.items())) or "none",
            "never" if self.recovered is None else f"{self.recovered:.1f}",
            f"{self.block}" if self.block else "-",
        ]


def markdown(rows: Iterable[Row]) -> str:
    """A table of all rows."""
    lines = [HEAD, ("---",) * len(HEAD), *(row.cells() for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write(rows: list[Row], directory: Path) -> None:
    """Write `faults.md` and `faults.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "faults.md").write_text(markdown(rows))
    (directory / "faults.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
