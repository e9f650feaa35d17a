"""Logging, set up once a process: one line an event, JSON where a machine reads it, plain on a terminal."""

import logging
import sys
from collections.abc import Iterable
from pathlib import Path

import structlog

from app.settings import Settings

# aiormq follows its line on a lost connection with a stack trace of its own reader; httpx tells of each request.
CHATTY = ("aiormq.connection", "httpx")


def configure_logging(settings: Settings, *, quiet: Iterable[str] = ()) -> None:
    """Send all log lines, ours and the libraries', to standard error in one form.

    `quiet` names loggers whose lines below ERROR nobody needs.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    plain = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if plain else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[settings.log_level]),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level)
    for name in ("uvicorn", "uvicorn.error", "celery"):
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = True
    for name in (*CHATTY, *quiet):
        logging.getLogger(name).setLevel(logging.ERROR)


class Pulse:
    """Touches a file while its process's own loop turns: health checks look at the file's age. No file, no touch."""

    interval = 5.0  # seconds

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def beat(self) -> None:
        """Touch the file; to be called every `interval`."""
        if self._path is not None:
            self._path.touch()
