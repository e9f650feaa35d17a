"""The servers of the stack: each with its own ports, data and configuration, beside whatever else runs here."""

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from app.settings import Settings
from deploy.native import health
from deploy.native.configuration import render
from deploy.native.layout import ROOT, Layout, StackError
from deploy.native.service import Service

TEMPLATES = Path(__file__).parent / "templates"
# Debian's own rabbitmq-server insists on root; the script behind it does not.
RABBITMQ_DIRECTORIES = ("/usr/lib/rabbitmq/bin", "/usr/local/lib/rabbitmq/bin")
SYSTEM_DIRECTORIES = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
NO_BUSY_WAIT = "+sbwt none +sbwtdcpu none +sbwtdio none -kernel inet_dist_use_interface {127,0,0,1}"
LAUNCHER = "deploy/native/embedded_database.py"


@dataclass(frozen=True)
class Tools:
    """Where the servers' programs are."""

    nginx: str
    redis: str
    rabbitmq: str
    epmd: str
    mongod: str | None

    @property
    def path(self) -> str:
        """The PATH of every process: the same whatever terminal the command came from."""
        found = [
            tool for tool in (sys.executable, self.nginx, self.redis, self.rabbitmq, self.epmd, self.mongod) if tool
        ]
        return os.pathsep.join(dict.fromkeys([*(str(Path(tool).parent) for tool in found), *SYSTEM_DIRECTORIES]))


def find_tools(path: str | None = None) -> Tools:
    """Find the servers' programs. Raises StackError naming those that are missing."""
    # A plain user of Debian has no sbin on PATH.
    where = (
        os.pathsep.join([*RABBITMQ_DIRECTORIES, os.environ.get("PATH", ""), *SYSTEM_DIRECTORIES])
        if path is None
        else path
    )
    names = {"nginx": "nginx", "redis": "redis-server", "rabbitmq": "rabbitmq-server", "epmd": "epmd"}
    found = {field: shutil.which(name, path=where) for field, name in names.items()}
    if missing := [names[field] for field, tool in found.items() if tool is None]:
        raise StackError(f"{', '.join(missing)} not found: `make setup` installs what is missing")
    return Tools(**{field: str(tool) for field, tool in found.items()}, mongod=shutil.which("mongod", path=where))


def redis(settings: Settings, layout: Layout, tools: Tools, environment: Mapping[str, str]) -> Service:
    """Return Redis: task records, progress, limits."""
    directory, port = layout.data("redis"), settings.redis_port
    configuration = directory / "redis.conf"
    return Service(
        name="redis",
        stage=1,
        command=(tools.redis, str(configuration)),
        environment=environment,
        directory=directory,
        files={configuration: render(TEMPLATES / "redis.conf.template", {"REDIS_PORT": str(port)})},
        ports={"REDIS_PORT": port},
        is_well=lambda _: health.redis(port),
        address=f"127.0.0.1:{port}",
    )


def epmd(settings: Settings, layout: Layout, tools: Tools, environment: Mapping[str, str]) -> Service:
    """Return Erlang's name server, one a stack: a broker that finds none starts one that nobody would stop."""
    port = settings.epmd_port
    return Service(
        name="epmd",
        stage=0,
        command=(tools.epmd, "-address", "127.0.0.1", "-port", str(port)),
        environment=environment,
        directory=layout.root,
        ports={"EPMD_PORT": port},
        is_well=lambda _: health.exchange(port),
        address=f"127.0.0.1:{port}",
    )


def rabbitmq(settings: Settings, layout: Layout, tools: Tools, environment: Mapping[str, str]) -> Service:
    """Return RabbitMQ. The node's name can be the same in every stack, each has an epmd of its own."""
    directory = layout.data("rabbitmq")
    port, management = settings.rabbitmq_port, settings.rabbitmq_management_port
    values = {
        "RABBITMQ_PORT": str(port),
        "RABBITMQ_MANAGEMENT_PORT": str(management),
        "RABBITMQ_PROMETHEUS_PORT": str(settings.rabbitmq_prometheus_port),
    }
    own = {
        "HOME": str(directory),  # of the cookie
        "RABBITMQ_NODENAME": "rabbit@localhost",
        "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(directory / "advanced.config"),
        "RABBITMQ_CONF_ENV_FILE": str(directory / "rabbitmq-env.conf"),  # not the machine's in /etc
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
        "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
        "RABBITMQ_LOG_BASE": str(directory),
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_DIST_PORT": str(settings.rabbitmq_dist_port),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": NO_BUSY_WAIT,
        "RUNNING_UNDER_SYSTEMD": "true",  # the script becomes the broker instead of waiting for it
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(settings.epmd_port),
        "ERL_CRASH_DUMP_SECONDS": "0",  # a dump has the size of its memory
    }
    return Service(
        name="rabbitmq",
        stage=1,
        command=(tools.rabbitmq,),
        environment={**environment, **own},
        directory=directory,
        files={
            directory / "rabbitmq.conf": render(TEMPLATES / "rabbitmq.conf.template", values),
            directory / "enabled_plugins": "[rabbitmq_management,rabbitmq_prometheus].\n",
        },
        ports={
            "RABBITMQ_PORT": port,
            "RABBITMQ_MANAGEMENT_PORT": management,
            "RABBITMQ_PROMETHEUS_PORT": settings.rabbitmq_prometheus_port,
            "RABBITMQ_DIST_PORT": settings.rabbitmq_dist_port,
        },
        is_well=lambda _: health.rabbitmq(port),
        complaint="[error]",
        start_seconds=120,
        stop_seconds=30,
        address=f"127.0.0.1:{port}",
    )


def database(settings: Settings, layout: Layout, tools: Tools, environment: Mapping[str, str], digest: str) -> Service:
    """Return mongod if there is one, else the embedded database, good for development and tests."""
    directory, port = layout.data("mongod" if tools.mongod else "embedded"), settings.mongodb_port
    embedded = (sys.executable, str(ROOT / LAUNCHER), "--host", "127.0.0.1", "--port", str(port))
    mongod = (str(tools.mongod), "--bind_ip", "127.0.0.1", "--port", str(port), "--replSet", "stack")
    # What a killed process has left open is in the way of its repeat for so long.
    short = ("--setParameter", "transactionLifetimeLimitSeconds=15")
    small = ("--wiredTigerCacheSizeGB", "0.5", "--nounixsocket", *short)
    return Service(
        name="database",
        stage=1,
        command=(*mongod, *small, "--dbpath", str(directory))
        if tools.mongod
        else (*embedded, "--storage-path", str(directory)),
        environment=environment,
        directory=directory,
        digest="" if tools.mongod else digest,
        ports={"MONGODB_PORT": port},
        is_well=lambda _: (
            health.mongod(port)
            if tools.mongod
            else health.mongodb(f"mongodb://127.0.0.1:{port}/?directConnection=true")
        ),
        stop_seconds=30,
        address=f"127.0.0.1:{port}",
    )


def nginx(settings: Settings, layout: Layout, tools: Tools, environment: Mapping[str, str], replicas: int) -> Service:
    """Return nginx with the configuration that the containers have too, in a directory of its own."""
    prefix, port = layout.root / "nginx", settings.nginx_port
    # Left to itself, a master started by root gives its workers to a user who cannot read below /root.
    user = " user root;" if os.geteuid() == 0 else ""
    return Service(
        name="nginx",
        stage=3,
        command=(
            tools.nginx,
            "-e",
            "stderr",
            "-p",
            f"{prefix}/",
            "-c",
            "nginx.conf",
            "-g",
            f"daemon off; pid nginx.pid;{user}",
        ),
        environment={**environment, "TZ": "UTC"},
        directory=prefix,
        files=nginx_files(settings, prefix, replicas),
        rereads=True,
        leaves_children=True,
        ports={"NGINX_PORT": port},
        is_well=lambda _: health.page(port, "/health"),
        start_seconds=20,
        stop_signal="QUIT",  # answers what it has accepted
        stop_seconds=10,
        address=f"http://127.0.0.1:{port}",
    )


def nginx_files(settings: Settings, prefix: Path, replicas: int) -> dict[Path, str]:
    """Return nginx's files by path. Raises StackError if the configuration is not in the checkout."""
    values = {
        "NGINX_LISTEN": f"127.0.0.1:{settings.nginx_port}",
        "API_SERVERS": " ".join(f"server 127.0.0.1:{settings.api_port + i} max_fails=0;" for i in range(replicas)),
        "SERVICE1_SERVERS": f"server 127.0.0.1:{settings.service1_port} max_fails=0;",
        "SERVICE2_SERVERS": f"server 127.0.0.1:{settings.service2_port} max_fails=0;",
        "GATEWAY_TIMEOUT": str(settings.gateway_timeout),
        "NGINX_RESOLVER": "",
        "NGINX_RATE": str(settings.nginx_rate),
        "NGINX_BURST": str(settings.nginx_burst),
        "NGINX_SUBMIT_RATE": str(settings.nginx_submit_rate),
        "NGINX_SUBMIT_BURST": str(settings.nginx_submit_burst),
        "NGINX_CONNECTIONS": str(settings.nginx_connections),
        "NGINX_BODY_MAX": settings.nginx_body_max,
        "NGINX_REAL_IP_FROM": settings.nginx_real_ip_from,
    }
    templates = sorted((ROOT / "nginx" / "templates").glob("*.template"))
    try:
        files = {prefix / "nginx.conf": (ROOT / "nginx" / "nginx.conf").read_text()}
    except OSError as error:
        raise StackError(f"nginx/nginx.conf: {error.strerror}") from error
    for template in [*templates, TEMPLATES / "native.conf.template"]:
        files[prefix / "conf.d" / template.stem] = render(template, values)
    return files
