"""Find out whether the ports are free, and if not, who has them and what moves ours."""

import errno
import socket
from collections.abc import Collection, Iterable
from contextlib import ExitStack

import psutil

from deploy.native.health import HOST
from deploy.native.layout import StackError
from deploy.native.service import Service

FIRST_OPEN_PORT, LAST_PORT = 8070, 65535


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on, none of them twice."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [int(one.getsockname()[1]) for one in sockets]


def why_not(port: int) -> int:
    """Return 0 for a port one can listen on, else the error number."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection closed lately is no obstacle
        try:
            probe.bind((HOST, port))
            probe.listen(1)
        except OSError as error:
            return error.errno or errno.EADDRINUSE
    return 0


def listeners() -> dict[int, int | None]:
    """Return the process that listens on each port; None where the system does not tell it to this user."""
    try:
        found = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return {}
    return {one.laddr.port: one.pid for one in found if one.status == psutil.CONN_LISTEN and one.laddr}


def check(services: Iterable[Service], ours: Collection[int]) -> None:
    """Raise StackError for the first port that a process other than `ours` listens on."""
    wanted = [(service.name, setting, port) for service in services for setting, port in service.ports.items()]
    claimed: dict[int, str] = {}
    for _, setting, port in wanted:
        if port in claimed:
            raise StackError(f"port {port} is given twice, to {claimed[port]} and to {setting}: set one to another")
        claimed[port] = setting
    blocked = {port: code for _, _, port in wanted if (code := why_not(port))}
    listening = listeners() if blocked else {}
    for name, setting, port in wanted:
        if port in blocked and listening.get(port) not in ours:
            has_it = "needs root" if blocked[port] == errno.EACCES else f"is taken by {describe(listening.get(port))}"
            other = another(port, claimed)
            raise StackError(f"port {port} of {name} {has_it}. To use another: {setting}={other} make run")


def another(port: int, avoid: Collection[int]) -> int:
    """Return a free port, some tens above this one if there is one there."""
    candidates = range(max(port, FIRST_OPEN_PORT) + 10, LAST_PORT, 10)
    return next((one for one in candidates if one not in avoid and not why_not(one)), free_ports(1)[0])


def describe(pid: int | None) -> str:
    """Return a name for a process."""
    if pid is None:
        return "another user's process"
    try:
        return f"{psutil.Process(pid).name()} (process {pid})"
    except psutil.Error:
        return f"process {pid}"
