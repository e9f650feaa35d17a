"""Render the configuration files: templates as envsubst does, supervisord.conf and the script of each process."""

import hashlib
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from deploy.native.layout import ROOT, Layout, StackError
from deploy.native.service import Service

VARIABLE = re.compile(r"\$(?:\{(?P<braced>[A-Za-z_]\w*)\}|(?P<bare>[A-Za-z_]\w*))")
UNRESOLVED = re.compile(r"\$\{([A-Z][A-Z0-9_]*)\}")

SUPERVISORD = """\
; Written by `make run`: changes are lost.
[supervisord]
nodaemon = false
pidfile = {pid}
logfile = {log}
logfile_maxbytes = 1MB
logfile_backups = 1
childlogdir = {logs}
umask = 077
directory = {root}
{user}
[unix_http_server]
file = {socket}
chmod = 0700

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
"""

# Started by hand, in order. Restarted for as long as they fail, each time a second later.
PROGRAM = """
[program:{name}]
command = {command}
autostart = false
autorestart = true
startsecs = 1
startretries = 1000000
stopsignal = {signal}
stopwaitsecs = {seconds}
killasgroup = true
stdout_logfile = {log}
stdout_logfile_maxbytes = 5MB
stdout_logfile_backups = 2
redirect_stderr = true
environment = FINGERPRINT="{fingerprint}"
"""


def envsubst(text: str, values: Mapping[str, str]) -> str:
    """Replace `${NAME}` and `$NAME` for the names given, as the official nginx image does; leave all else."""

    def value(match: re.Match[str]) -> str:
        return values.get(match["braced"] or match["bare"], match[0])

    return VARIABLE.sub(value, text)


def render(template: Path, values: Mapping[str, str]) -> str:
    """Return a template's text. Raises StackError if it needs a value that is not there."""
    try:
        text = envsubst(template.read_text(), values)
    except OSError as error:
        raise StackError(f"{template}: {error.strerror}") from error
    if missing := UNRESOLVED.search(text):
        raise StackError(f"{template}: nothing gives ${{{missing[1]}}} a value")
    return text


def all_files(layout: Layout, services: Iterable[Service], python: str) -> dict[Path, str]:
    """Return the text of every file the stack is started from, by path."""
    services = list(services)
    scripts = {layout.programs / service.name: script(service, python) for service in services}
    files = {path: text for service in services for path, text in service.files.items()}
    return {**files, **scripts, layout.supervisord_conf: supervisord_conf(layout, services, python)}


def supervisord_conf(layout: Layout, services: Iterable[Service], python: str) -> str:
    """Return supervisord's configuration: one program a process, so that one can come or go alone."""
    text = SUPERVISORD.format(
        pid=escape(layout.supervisord_pid),
        log=escape(layout.log("supervisord")),
        logs=escape(layout.logs),
        root=escape(layout.root),
        socket=escape(layout.socket),
        user="user = root\n" if os.geteuid() == 0 else "",  # or it warns at every start
    )
    return text + "".join(
        PROGRAM.format(
            name=service.name,
            command=escape(shlex.join(["/bin/sh", str(layout.programs / service.name)])),
            signal=service.stop_signal,
            seconds=service.stop_seconds,
            log=escape(layout.log(service.name)),
            fingerprint=fingerprint(service, python),
        )
        for service in services
    )


def escape(value: object) -> str:
    """Return a value as supervisord.conf reads it: a percent sign begins an expansion there."""
    return str(value).replace("%", "%%")


def script(service: Service, python: str) -> str:
    """Return the script that becomes the process: supervisord.conf cannot quote every value of an environment."""
    lines = ["#!/bin/sh", "# Written by `make run`: changes are lost."]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(service.environment.items())]
    # nginx has 10,000 connections a worker; the limit a shell starts with is often 1,024.
    lines.append('ulimit -n 20000 2>/dev/null || ulimit -n "$(ulimit -H -n)" || true')
    if service.leaves_children:
        lines.append(f"cd {shlex.quote(str(ROOT))}")
        lines.append(f"{shlex.quote(python)} -m deploy.native.processes {shlex.quote(service.name)}")
    lines.append(f"cd {shlex.quote(str(service.directory))}")
    lines.append(f"exec {shlex.join(service.command)}")
    return "\n".join(lines) + "\n"


def fingerprint(service: Service, python: str) -> str:
    """Return what changes when the process must be restarted: its script, its configuration or its code."""
    files = "" if service.rereads else "".join(service.files.values())
    return hashlib.sha256("\0".join([script(service, python), files, service.digest]).encode()).hexdigest()[:16]
