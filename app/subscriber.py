"""A process that handles the events of one service: `python -m app.subscriber audit`. Any number may run.

Its handlers are those of the module of that name in app/handlers.
"""

import argparse
import asyncio
import signal
from importlib import import_module

from app.context import open_context
from app.contracts import SUBSCRIPTIONS, Service
from app.engine.events import Handlers
from app.engine.loops import together
from app.settings import get_settings
from app.telemetry import Pulse, configure_logging
from app.watchman import watched


async def pulse(beat: Pulse) -> None:
    """Show that the event loop turns."""
    while True:
        beat.beat()
        await asyncio.sleep(Pulse.interval)


async def main(service: Service) -> None:
    """Run until SIGTERM or SIGINT; what is in work then is finished, within a bound."""
    settings = get_settings().model_copy(update={"mongodb_pool_min": 0})
    configure_logging(settings)
    on: Handlers = import_module(f"app.handlers.{service}").on
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with (
        open_context(settings, service=f"events-{service}") as context,
        watched(settings.loop_block_warning),
        context.subscriber(service, on),
    ):
        await together([stopped(stop), pulse(Pulse(settings.alive_file))])


async def stopped(stop: asyncio.Event) -> None:
    """Return when the process is told to stop."""
    await stop.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m app.subscriber", description=__doc__)
    parser.add_argument("service", choices=[str(service) for service in SUBSCRIPTIONS])
    asyncio.run(main(Service(parser.parse_args().service)))
