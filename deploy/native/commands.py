"""What can be done with a stack: up, scale, down, clean. Each is one function, also for tests."""

import time

from app.settings import Settings
from deploy.native import health, processes
from deploy.native.converge import Convergence, converging, is_well
from deploy.native.demonstration import demonstrate
from deploy.native.layout import Layout, StackError, State, as_environment
from deploy.native.output import Output
from deploy.native.plan import SCALED, Plan, digests, has_own_database
from deploy.native.servers import find_tools
from deploy.native.supervision import Supervisor
from deploy.native.teardown import GRACE_SECONDS, stop_everything, uninterrupted

REPLICAS_MAX = 50
NOT_RUNNING = "the stack is not running: `make run` starts it"
NOTHING = "nothing was running"
BUSY = "another command is at work on this stack: waiting for it"


def up(settings: Settings, output: Output, *, demo: bool = True) -> None:
    """Start the stack, or what of it does not run as these settings say. Raises StackError; then nothing is left."""
    begun = time.monotonic()
    layout = Layout.of(settings)
    layout.prepare()
    with layout.lock(lambda: output.say(BUSY)):
        tools = find_tools()
        if not has_own_database(settings) and not health.mongodb(settings.mongodb_url.get_secret_value(), seconds=5):
            raise StackError("MONGODB_URL does not answer: mend it, or unset it for a database of the stack's own")
        end_leftovers(layout, output)
        earlier = State.load(layout)
        state = State(as_environment(settings), digests(), earlier.scaled if earlier else {})
        plan = Plan(settings, layout, tools, state.digests, state.scaled)
        with converging(layout, plan.services(), output) as started:
            state.save(layout)
            if started and demo and settings.api_keys_required:
                output.say(
                    "No example task: calls need an API key, `.venv/bin/python -m app api-keys create --name me`"
                )
            elif started and demo:
                demonstrate(settings.nginx_port, output)
    output.addresses(settings, time.monotonic() - begun)


def end_leftovers(layout: Layout, output: Output) -> None:
    """End processes whose supervisord was killed. Raises StackError for one that will not end."""
    if Supervisor(layout).running():
        return
    left = processes.of_stack(layout.root)
    if left:
        output.say(f"supervisord had ended: stopping the {len(left)} processes it has left")
        if processes.end(left, GRACE_SECONDS):
            raise StackError("processes of an earlier run will not end: `make down` names them")


def scale(settings: Settings, wanted: dict[str, int], output: Output) -> None:
    """Run this many processes of each kind named, leaving all others alone. Raises StackError."""
    layout = Layout.of(settings)
    if not wanted:
        raise StackError("how many of what? For example: make scale api=4 worker=3")
    for what, count in wanted.items():
        if what not in SCALED:
            raise StackError(f"{what} cannot be scaled: {', '.join(SCALED)} can")
        if not 1 <= count <= REPLICAS_MAX:
            raise StackError(f"{what}={count}: 1 to {REPLICAS_MAX} can run")
    running_or_raise(layout)
    with layout.lock(lambda: output.say(BUSY)):
        state = running_or_raise(layout)
        state.scaled |= wanted
        plan = Plan(state.restored(), layout, find_tools(), state.digests, state.scaled)
        with converging(layout, plan.services(), output):
            state.save(layout)


def restart_rolling(settings: Settings, output: Output) -> None:
    """Restart every process of ours, one at a time, with the code as it is now and the settings it runs with.

    Raises StackError, before anything is touched where a process is not well: another must serve meanwhile.
    """
    begun = time.monotonic()
    layout = Layout.of(settings)
    running_or_raise(layout)
    with layout.lock(lambda: output.say(BUSY)):
        state = running_or_raise(layout)
        known = Supervisor(layout).processes()
        state.digests |= {"app": digests()["app"]}  # the servers are not ours to restart
        services = Plan(state.restored(), layout, find_tools(), state.digests, state.scaled).services()
        if unwell := [one.name for one in services if one.name not in known or not is_well(one, known[one.name])]:
            raise StackError(f"{', '.join(unwell)} not well: nothing is restarted before all are (`make status`)")
        Convergence(layout, services, output).roll()
        state.save(layout)
    output.say(f"Restarted one after the other ({time.monotonic() - begun:.1f} s).")


def running_or_raise(layout: Layout) -> State:
    """Return what the stack runs with. Raises StackError if it does not run."""
    state = State.load(layout)
    if state is None or not Supervisor(layout).running():
        raise StackError(NOT_RUNNING)
    return state


def down(settings: Settings, output: Output) -> None:
    """Stop the stack and forget how it was scaled; its data stays. Raises StackError if a process will not end."""
    layout = Layout.of(settings)
    if not layout.root.exists():
        output.say(NOTHING)
        return
    with layout.lock(lambda: output.say(BUSY)), uninterrupted():
        stopped = stop_everything(layout, output)
        layout.state.unlink(missing_ok=True)
    output.say(f"stopped; its data is in {layout.root / 'data'}" if stopped else NOTHING)


def clean(settings: Settings, output: Output) -> None:
    """Stop the stack and remove its directory with all data. Raises StackError."""
    layout = Layout.of(settings)
    if layout.root.exists():
        with layout.lock(lambda: output.say(BUSY)), uninterrupted():
            stop_everything(layout, output)
            layout.remove()
    output.say(f"{layout.root} is gone")
