"""The list of processes that given settings ask for."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

from app.settings import Settings, own_urls
from deploy.native import health, servers
from deploy.native.layout import ROOT, Layout, as_environment
from deploy.native.processes import STACK
from deploy.native.service import BACKENDS, Service, digest_of, kind_of

# These only say where the native stack listens and how much of it there is: no Python process needs them.
OF_THE_STACK = frozenset(
    name.upper()
    for name in Settings.model_fields
    if name.startswith("nginx_")
    or name.endswith("_port")
    or name in {"stack_dir", "api_replicas", "heavy_workers", "beats", "gateway_timeout"}
)
SCALED = {"api": "api_replicas", "worker": "heavy_workers", "beat": "beats"}  # what `make scale` calls it: the setting
CELERY = ("-m", "celery", "-q", "-A", "app.worker", "worker")
QUIET = ("--without-gossip", "--without-mingle", "--without-heartbeat")


@dataclass(frozen=True)
class Plan:
    """Settings and what was found on this machine, turned into services."""

    settings: Settings
    layout: Layout
    tools: servers.Tools
    digests: Mapping[str, str]
    scaled: Mapping[str, int]

    def count(self, what: str) -> int:
        """Return how many processes of a kind there are to be."""
        return self.scaled.get(what) or int(getattr(self.settings, SCALED[what]))

    def services(self) -> list[Service]:
        """Return every process, in the order of start."""
        common = (self.settings, self.layout, self.tools, self.environment())
        found = [servers.epmd(*common), servers.redis(*common), servers.rabbitmq(*common)]
        if has_own_database(self.settings):
            found.append(servers.database(*common, self.digests["database"]))
        found += [self.api(number) for number in range(1, self.count("api") + 1)]
        found += [self.worker(f"heavy-{number}") for number in range(1, self.count("worker") + 1)]
        found += [self.worker("light-1"), *(self.beat(number) for number in range(1, self.count("beat") + 1))]
        found.append(self.subscriber("audit"))
        found += [self.backend(name) for name in BACKENDS]
        return [*found, servers.nginx(*common, self.count("api"))]

    def environment(self) -> dict[str, str]:
        """Return the whole environment of a process that reads no settings."""
        places = {"PATH": self.tools.path, "HOME": str(self.layout.root), "LANG": "C.UTF-8", "TZ": "UTC"}
        return {**places, STACK: str(self.layout.root)}

    def python(self, name: str, *arguments: str) -> Service:
        """Return a process of the application; without a port it tells by a file that it is well."""
        alive = self.layout.alive(name)
        urls = own_urls(self.settings)
        own = {
            "REDIS_URL": urls["redis_url"],
            "RABBITMQ_URL": urls["rabbitmq_url"],
            "ALIVE_FILE": str(alive),
            "PYTHONUNBUFFERED": "1",
        }
        read = {key: value for key, value in as_environment(self.settings).items() if key not in OF_THE_STACK}
        return Service(
            name=name,
            stage=2,
            command=(sys.executable, *arguments),
            environment={**self.environment(), **read, **own},
            directory=ROOT,
            digest=self.digests["app"],
            is_well=lambda started: health.alive(alive, started),
        )

    def api(self, number: int) -> Service:
        """Return a replica of the API."""
        port = self.settings.api_port + number - 1
        return replace(
            self.python(f"api-{number}", *uvicorn("app.main", port)),
            ports={"API_PORT": port},
            is_well=lambda _: health.page(port, "/health/ready"),
            stop_seconds=30,
            address=f"http://127.0.0.1:{port}",
        )

    def worker(self, name: str) -> Service:
        """Return a Celery worker: of the heavy queues or, apart from them, of the light one."""
        heavy = kind_of(name) == "heavy"
        settings = self.settings
        limits = (
            (settings.heavy_concurrency, settings.heavy_soft_time_limit, settings.heavy_time_limit)
            if heavy
            else (settings.light_concurrency, settings.light_soft_time_limit, settings.light_time_limit)
        )
        processes, soft, hard = map(str, limits)
        queues = "heavy.high,heavy,heavy.low" if heavy else "light"
        sizes = ("-n", f"{name}@%h", "-Q", queues, "-c", processes, "--soft-time-limit", soft, "--time-limit", hard)
        service = self.python(name, *CELERY, *sizes, *QUIET)
        # SIGTERM then means: finish within a few seconds or hand the task back.
        environment = {**service.environment, "REMAP_SIGTERM": "SIGQUIT"}
        return replace(service, environment=environment, stop_seconds=30)

    def backend(self, name: str) -> Service:
        """Return one of the small applications beside the API."""
        port: int = getattr(self.settings, f"{name}_port")
        return replace(
            self.python(name, *uvicorn(f"app.backends.{name}", port)),
            ports={f"{name.upper()}_PORT": port},
            is_well=lambda _: health.page(port, "/health"),
            stop_seconds=30,
            address=f"http://127.0.0.1:{port}",
        )

    def beat(self, number: int) -> Service:
        """Return the background process; a second one stands by."""
        return self.python("beat" if number == 1 else f"beat-{number}", "-m", "app.beat")

    def subscriber(self, service: str) -> Service:
        """Return the process that handles the events of a service."""
        return replace(self.python("events-1", "-m", "app.subscriber", service), stop_seconds=30)


def uvicorn(module: str, port: int) -> tuple[str, ...]:
    """Return the arguments of an application: nginx keeps connections to it for 60 s, so it must for longer."""
    address = ("--host", "127.0.0.1", "--port", str(port), "--backlog", "2048")
    timeouts = ("--timeout-keep-alive", "75", "--timeout-graceful-shutdown", "20")
    http = ("--http", "app.api.protocol:OneWriteProtocol")
    plain = ("--no-access-log", "--no-proxy-headers", "--no-server-header")
    return ("-m", "uvicorn", f"{module}:create_app", "--factory", *address, *timeouts, *http, *plain)


def has_own_database(settings: Settings) -> bool:
    """Tell whether the stack starts a database: not if MONGODB_URL names another one."""
    return settings.mongodb_url.get_secret_value() == own_urls(settings)["mongodb_url"]


def digests() -> dict[str, str]:
    """Return what changes with the code the processes run."""
    return {"app": digest_of("app", "requirements.txt"), "database": digest_of(servers.LAUNCHER)}
