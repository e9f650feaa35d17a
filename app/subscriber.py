"""A process that handles the events of one service: `python -m app.subscriber audit`. Any number may run.

Its handlers are those of the module of that name in app/handlers.
"""

import argparse
import asyncio
from importlib import import_module
from pkgutil import iter_modules

from app import handlers
from app.context import open_context
from app.contracts import Service
from app.engine.events import Handlers
from app.engine.loops import pulse, together, told_to_stop
from app.settings import get_settings
from app.telemetry import Pulse, configure_logging
from app.watchman import watched


async def main(service: Service) -> None:
    """Run until SIGTERM or SIGINT; what is in work then is finished, within a bound."""
    settings = get_settings().model_copy(update={"mongodb_pool_min": 0})
    configure_logging(settings)
    on: Handlers = import_module(f"app.handlers.{service}").on
    async with (
        open_context(settings, service=f"events-{service}") as context,
        watched(settings.loop_block_warning),
        context.subscriber(service, on),
    ):
        await together([told_to_stop(), pulse(Pulse(settings.alive_file))])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m app.subscriber", description=__doc__)
    parser.add_argument("service", choices=[module.name for module in iter_modules(handlers.__path__)])
    asyncio.run(main(Service(parser.parse_args().service)))
