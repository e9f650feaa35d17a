"""An idle program beside the stack: where it is late with a CPU free, the machine stood still, and no event loop."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.watchman import RunQueue
from tests.integration.harness import ROOT

INTERVAL = 0.01  # seconds between two looks at the clock
LATE = 0.005  # seconds that are told
WINDOW = 1.2  # seconds that may lie between a block and the log line that tells of it


class Stalls:
    """When the machine stood still so far, as the witness wrote it to `path`: a line of (end, seconds) each."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def before(self, moment: float) -> float:
        """Seconds of the longest stall that a log line of `moment` (seconds since the epoch) may tell of."""
        rows = (line.split() for line in self._path.read_text().splitlines())
        return max((float(took) for end, took in rows if -0.1 < moment - float(end) < WINDOW), default=0.0)


@contextmanager
def witnessed(path: Path) -> Iterator[Stalls]:
    """Run the witness meanwhile."""
    with path.open("wb") as out:
        program = subprocess.Popen([sys.executable, "-m", "tests.faults.witness"], cwd=ROOT, stdout=out)
        try:
            yield Stalls(path)
        finally:
            program.kill()
            program.wait()


def main() -> None:
    """Watch the clock until killed."""
    queue = RunQueue()
    seen, waited = time.monotonic(), queue.waited()
    while True:
        time.sleep(INTERVAL)
        now, queued = time.monotonic(), queue.waited()
        late = now - seen - INTERVAL - (queued - waited)
        if late > LATE:
            sys.stdout.write(f"{time.time():.3f} {late:.3f}\n")
            sys.stdout.flush()
        seen, waited = now, queued


if __name__ == "__main__":
    main()
