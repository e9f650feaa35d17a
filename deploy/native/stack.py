"""The whole stack on this machine, without containers: what `make run` and its companions call.

Every setting of app/settings.py counts; ports and STACK_DIR move a stack beside another one.
"""

import argparse
import os
import signal
import sys

from pydantic import ValidationError

from app.settings import Settings
from deploy.native import commands, report
from deploy.native.layout import ROOT, StackError
from deploy.native.output import Output

INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    main = argparse.ArgumentParser(prog="python -m deploy.native.stack", description=__doc__)
    add = main.add_subparsers(dest="command", required=True, metavar="command").add_parser
    up = add("up", help="start everything, run an example task; a second time: start what does not run")
    up.add_argument("--no-demo", action="store_true", help="without the example task")
    add("status", help="a line a process; exit code 1 unless all are healthy")
    logs = add("logs", help="follow the logs")
    logs.add_argument(
        "service",
        nargs="?",
        help="api, worker, heavy, light, beat, service1, nginx, redis, rabbitmq, database, api-1, …",
    )
    logs.add_argument("--lines", type=int, default=10, help="of each log to begin with (10)")
    logs.add_argument("--no-follow", action="store_true", help="end after those")
    scale = add("scale", help="change how many run; holds until `down`")
    scale.add_argument(
        "counts", nargs="*", type=count, metavar="api=4 | worker=3 | beat=2", help="worker: of the heavy queues"
    )
    add("restart-rolling", help="restart the API, workers and beat one at a time, so that no request fails")
    add("down", help="stop everything, keep the data")
    add("clean", help="stop everything, remove the data")
    return main


def count(text: str) -> tuple[str, int]:
    """Return `api=4` as a pair. Raises ValueError."""
    what, _, number = text.partition("=")
    return what, int(number)


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Do what was asked and return the exit code. Raises StackError."""
    settings = Settings()
    match arguments.command:
        case "up":
            commands.up(settings, output, demo=not arguments.no_demo)
        case "status":
            return 0 if report.status(settings, output) else 1
        case "logs":
            report.logs(settings, arguments.service, output, lines=arguments.lines, follow=not arguments.no_follow)
        case "scale":
            commands.scale(settings, dict(arguments.counts), output)
        case "restart-rolling":
            commands.restart_rolling(settings, output)
        case "down":
            commands.down(settings, output)
        case "clean":
            commands.clean(settings, output)
    return 0


def main(words: list[str] | None = None) -> int:
    """Return the exit code; errors are a line, not a traceback."""
    arguments = parser().parse_args(words)
    output = Output()
    os.chdir(ROOT)  # where .env is
    for one in (signal.SIGTERM, signal.SIGHUP):  # a closed terminal undoes a half start too
        signal.signal(one, signal.default_int_handler)
    try:
        return run(arguments, output)
    except StackError as error:
        output.fail(error)
    except ValidationError as error:
        lines = [": ".join([*(str(part).upper() for part in one["loc"]), one["msg"]]) for one in error.errors()]
        output.fail(StackError(f"a setting cannot be used: {'; '.join(lines)}"))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone, as in `| head`
        return 0
    except OSError as error:  # no space, another user's directory, supervisord killed meanwhile
        output.fail(StackError(f"{arguments.command} failed: {error}"))
    except KeyboardInterrupt:
        if arguments.command == "logs":
            return 0
        output.say("interrupted: what this command started is stopped again")
        return INTERRUPTED
    return 1


if __name__ == "__main__":
    sys.exit(main())
