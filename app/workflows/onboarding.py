"""Onboarding: an account, then a mailbox, a badge and a laptop side by side, then a mail."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from app.contracts import CreateAccount, Onboarding, Provide, TakeBack, TaskName, Welcome
from app.engine.workflows import Definition, Results, Step, Undo

PROVIDED: tuple[Literal["mailbox", "badge", "laptop"], ...] = ("mailbox", "badge", "laptop")


def steps(request: Onboarding) -> Sequence[Step]:
    """The members for one newcomer."""
    seconds = request.seconds
    account = Step(
        "account",
        TaskName.CREATE_ACCOUNT,
        lambda _: CreateAccount(name=request.name, email=request.email, seconds=seconds),
        undo=_undo(request, "account"),
    )
    welcome = Step(
        "welcome",
        TaskName.WELCOME,
        lambda results: Welcome(
            account=results["account"]["account"],
            provided={what: results[what]["id"] for what in PROVIDED},
            seconds=seconds,
        ),
        after=PROVIDED,
    )
    return [account, *(_provide(request, what) for what in PROVIDED), welcome]


def _provide(request: Onboarding, what: Literal["mailbox", "badge", "laptop"]) -> Step:
    model = request.laptop if what == "laptop" else ""

    def payload(results: Results) -> Provide:
        return Provide(account=results["account"]["account"], what=what, model=model, seconds=request.seconds)

    return Step(what, TaskName.PROVIDE, payload, after=("account",), undo=_undo(request, what))


def _undo(request: Onboarding, what: Literal["account", "mailbox", "badge", "laptop"]) -> Undo:
    payload: Callable[[Results], TakeBack] = lambda _: TakeBack(  # noqa: E731
        email=request.email, what=what, seconds=request.seconds
    )
    return Undo(TaskName.TAKE_BACK, payload)


def outcome(results: Results) -> dict[str, Any]:
    """The account, and what its owner got."""
    return {"account": results["account"]["account"], **{what: results[what]["id"] for what in PROVIDED}}


DEFINITION = Definition("onboarding", Onboarding, steps, outcome)
