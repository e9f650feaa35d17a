"""Stop a stack and see to it that nothing of it is left."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from deploy.native import processes
from deploy.native.layout import Layout, StackError
from deploy.native.output import Output
from deploy.native.service import BACKENDS, kind_of
from deploy.native.supervision import Supervisor

# No new requests first, then what uses the servers, then the servers; the broker's name server outlives it.
ORDER = (
    ("nginx",),
    ("api", "heavy", "light", "beat", "events", *BACKENDS),
    ("redis", "rabbitmq", "database"),
    ("epmd",),
)
GRACE_SECONDS = 15  # of what supervisord no longer knows: a broker needs 10


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let a second Ctrl-C not leave half a stack behind."""
    earlier = [(one, signal.signal(one, signal.SIG_IGN)) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    try:
        yield
    finally:
        for one, handler in earlier:
            signal.signal(one, handler)


def stop_everything(layout: Layout, output: Output) -> bool:
    """Stop the stack, whatever state it is in, and tell whether any of it ran.

    Raises StackError if a process will not end.
    """
    supervisor = Supervisor(layout)
    found = bool(processes.of_stack(layout.root))
    if supervisor.running():
        names = list(supervisor.processes())
        for kinds in ORDER:
            group = [name for name in names if kind_of(name) in kinds]
            with output.waiting(f"stopping {', '.join(group)}"):
                supervisor.stop(group)
        supervisor.shutdown()
    left = processes.end(processes.of_stack(layout.root), GRACE_SECONDS)
    if left:
        raise StackError(f"these processes will not end: {', '.join(str(one.pid) for one in left)}")
    return found
