"""Every setting of the stack, and the only place that reads the environment.

A value comes from, in this order: an environment variable of the field's name in capitals, a file of that name
(in small letters) in `/run/secrets`, a line in `.env`, the default below. `.env.example` lists them in this order.
"""

from functools import cache
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

SECRETS_DIR = Path("/run/secrets")
DEVELOPMENT_SECRET = "development-only-not-a-secret"  # noqa: S105  refused outside development
DEFAULT_PASSWORDS = frozenset({"", "guest", "password", "changeme", "admin", "root", "secret", DEVELOPMENT_SECRET})

BURST_MAX = 1_000_000

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseSettings):
    """One instance a process; see `get_settings`. Raises `pydantic.ValidationError` for a value that cannot be."""

    model_config = SettingsConfigDict(
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,  # a refused value may be a secret
        secrets_dir=SECRETS_DIR if SECRETS_DIR.is_dir() else None,
    )

    # What this is
    environment: Literal["development", "production"] = "development"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["auto", "json", "console"] = "auto"
    identity_secret: SecretStr = SecretStr(DEVELOPMENT_SECRET)
    task_modules: Annotated[tuple[str, ...], NoDecode] = ()

    # MongoDB
    mongodb_url: SecretStr = SecretStr("mongodb://127.0.0.1:27090/?directConnection=true")
    mongodb_database: str = "stack"
    mongodb_driver: Literal["pymongo", "motor"] = "pymongo"
    mongodb_pool_min: Annotated[int, Field(ge=0)] = 10
    mongodb_pool_max: Count = 100
    mongodb_timeout: Seconds = 5
    item_identity_ttl: Annotated[int, Field(ge=86_400)] = 86_400

    # Redis
    redis_url: SecretStr = SecretStr("redis://127.0.0.1:6390/0")
    redis_pool_max: Count = 100
    redis_timeout: Annotated[float, Field(ge=1)] = 5
    redis_patience: Seconds = 300

    # RabbitMQ and the queues
    rabbitmq_url: SecretStr = SecretStr("amqp://guest:guest@127.0.0.1:5690//")
    publish_timeout: Seconds = 5
    queue_max_length: Count = 10_000
    queue_delivery_limit: Count = 5
    dead_letter_max_length: Count = 100_000

    # Tasks, their results and the archive
    progress_interval: Seconds = 0.1
    result_ttl: Count = 86_400
    result_max_bytes: Count = 262_144
    celery_result_ttl: Count = 3_600
    archive_batch: Annotated[int, Field(ge=1, le=1000)] = 200
    archive_backlog_max: Count = 10_000
    archive_retention_days: Count = 30
    dead_letter_retention_days: Count = 7
    reconcile_interval: Seconds = 5
    reconcile_after: Annotated[float, Field(ge=1)] = 30
    recovery_time: Count = 720
    reconcile_batch: Annotated[int, Field(ge=1, le=1000)] = 200
    archive_lookup_timeout: Seconds = 1

    # Workers
    heavy_concurrency: Count = 2
    heavy_soft_time_limit: Count = 600
    heavy_time_limit: Count = 660
    light_concurrency: Count = 2
    light_soft_time_limit: Count = 60
    light_time_limit: Count = 90
    worker_max_tasks_per_child: Count = 1_000
    worker_max_memory_per_child: Count = 400_000
    worker_soft_shutdown_timeout: Seconds = 10
    alive_file: Path | None = None

    # Events and the outbox
    event_queue_max_length: Count = 100_000
    event_prefetch: Annotated[int, Field(ge=1, le=1000)] = 10
    event_handler_timeout: Annotated[float, Field(gt=0, le=60)] = 10
    event_marker_days: Count = 14
    event_key_ttl: Annotated[int, Field(ge=86_400)] = 86_400
    outbox_interval: Seconds = 1
    outbox_batch: Annotated[int, Field(ge=1, le=1000)] = 100
    outbox_ttl: Count = 86_400

    # What tasks call
    outside_url: str = "http://127.0.0.1:8003"
    outside_timeout: Seconds = 5

    # API
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = ("127.0.0.1", "::1")
    body_max_bytes: Count = 1_048_576
    watchers_max: Annotated[int, Field(ge=0)] = 2_000
    stream_heartbeat: Annotated[float, Field(ge=0.1, le=30)] = 15
    stream_send_timeout: Seconds = 10
    health_timeout: Seconds = 1
    health_cache: Seconds = 1
    loop_block_warning: Seconds = 0.05

    # Who may, and how much
    api_keys_required: bool = False
    api_keys_cache: Seconds = 30
    api_keys_grace: Annotated[float, Field(ge=0)] = 300
    quota_rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0
    quota_burst: Annotated[int, Field(ge=1, le=BURST_MAX)] = 100
    quota_timeout: Seconds = 0.5
    concurrency_max: Count = 200
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()

    # The gateway
    service1_url: str = "http://127.0.0.1:8001"
    service2_url: str = "http://127.0.0.1:8002"
    gateway_timeout: Annotated[int, Field(ge=1, le=3600)] = 30

    # Nginx
    nginx_rate: Count = 100
    nginx_burst: Count = 200
    nginx_submit_rate: Count = 50
    nginx_submit_burst: Count = 200
    nginx_connections: Count = 500
    nginx_body_max: str = "1m"
    nginx_real_ip_from: str = "192.0.2.1"  # of a range for examples: nobody

    # The native stack (`make run`)
    stack_dir: Path = Path(".stack")
    nginx_port: Port = 8080
    api_port: Port = 8101
    api_replicas: Annotated[int, Field(ge=1, le=50)] = 2
    heavy_workers: Annotated[int, Field(ge=1, le=50)] = 1
    beats: Annotated[int, Field(ge=1, le=50)] = 1
    service1_port: Port = 8001
    service2_port: Port = 8002
    outside_port: Port = 8003
    redis_port: Port = 6390
    rabbitmq_port: Port = 5690
    rabbitmq_management_port: Port = 15690
    rabbitmq_prometheus_port: Port = 15691
    rabbitmq_dist_port: Port = 25690
    epmd_port: Port = 4390
    mongodb_port: Port = 27090

    @field_validator("task_modules", "trusted_proxies", "cors_origins", mode="before")
    @classmethod
    def split_commas(cls, value: object) -> object:
        """Let a list be written `a,b` in the environment."""
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def follow_ports(self) -> Self:
        """Let an address that nobody gave be that of the native stack, wherever its ports were moved to."""
        for name, url in own_urls(self).items():
            if name not in self.model_fields_set:
                object.__setattr__(self, name, SecretStr(url))  # frozen for all others
        for name in ("outside", "service1", "service2"):
            if f"{name}_url" not in self.model_fields_set:
                object.__setattr__(self, f"{name}_url", f"http://127.0.0.1:{getattr(self, f'{name}_port')}")
        return self

    @model_validator(mode="after")
    def outlast_replays(self) -> Self:
        """A dead letter's replay must find the marker of an event that was handled all the same."""
        if self.event_marker_days <= self.dead_letter_retention_days:
            raise ValueError("EVENT_MARKER_DAYS has to be more than DEAD_LETTER_RETENTION_DAYS")
        return self

    @model_validator(mode="after")
    def refuse_default_secrets(self) -> Self:
        """Outside development no default or missing password starts: a copied example must not reach production."""
        if self.environment == "development":
            return self
        urls = {"MONGODB_URL": self.mongodb_url, "REDIS_URL": self.redis_url, "RABBITMQ_URL": self.rabbitmq_url}
        weak = [name for name, url in urls.items() if _password(name, url) in DEFAULT_PASSWORDS]
        if self.identity_secret.get_secret_value() in DEFAULT_PASSWORDS:
            weak.append("IDENTITY_SECRET")
        if weak:
            message = f"{', '.join(weak)}: a default or empty password is only accepted with ENVIRONMENT=development"
            raise ValueError(message)
        return self


def own_urls(settings: Settings) -> dict[str, str]:
    """The addresses of the native stack's servers, by the setting that they are the default of."""
    return {
        "mongodb_url": f"mongodb://127.0.0.1:{settings.mongodb_port}/?directConnection=true",
        "redis_url": f"redis://127.0.0.1:{settings.redis_port}/0",
        "rabbitmq_url": f"amqp://guest:guest@127.0.0.1:{settings.rabbitmq_port}//",
    }


def _password(name: str, url: SecretStr) -> str:
    try:
        return unquote(urlsplit(url.get_secret_value()).password or "")
    except ValueError:
        # Its own message repeats the URL.
        raise ValueError(f"{name} is no valid URL") from None


@cache
def get_settings() -> Settings:
    """The process's settings, read once. Raises `pydantic.ValidationError`."""
    return Settings()
