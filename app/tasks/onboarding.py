"""Onboarding, step by step. Each step's effect carries the workflow's id, so that to do it again changes nothing."""

import time

from app.celery_app import celery
from app.context import worker_context
from app.contracts import CreateAccount, Provide, TakeBack, TaskName, Welcome
from app.database import NewcomerRepository
from app.engine.errors import PermanentError
from app.engine.task import LightTask, Task

SOLD_OUT = "sold-out"
SLICE = 0.1  # seconds


class AccountTakenError(PermanentError):
    """The address belongs to somebody already."""

    kind = "account_taken"


class NoAccountError(PermanentError):
    """There is no account that this could be given to."""

    kind = "no_account"


class SoldOutError(PermanentError):
    """There is none left of what was asked for."""

    kind = "sold_out"


@celery.task(name=TaskName.CREATE_ACCOUNT, base=LightTask, bind=True, pydantic=True)
def create_account(self: LightTask, payload: CreateAccount) -> dict[str, str]:
    """Make an account; fails for an address that has one."""
    _spend(self, payload.seconds)
    if not _newcomers().create(payload.email, payload.name, workflow=self.workflow):
        raise AccountTakenError(f"{payload.email} has an account already.")
    return {"account": payload.email}


@celery.task(name=TaskName.PROVIDE, base=LightTask, bind=True, pydantic=True)
def provide(self: LightTask, payload: Provide) -> dict[str, str]:
    """Give a mailbox, a badge or a laptop."""
    _spend(self, payload.seconds)
    if payload.model == SOLD_OUT:
        raise SoldOutError(f"There is no {payload.what} of this model left.")
    return {"id": _give(self, payload.account, payload.what)}


@celery.task(name=TaskName.WELCOME, base=LightTask, bind=True, pydantic=True)
def welcome(self: LightTask, payload: Welcome) -> dict[str, str]:
    """Send the mail, once."""
    _spend(self, payload.seconds)
    return {"mail": _give(self, payload.account, "mail")}


@celery.task(name=TaskName.TAKE_BACK, base=LightTask, bind=True, pydantic=True)
def take_back(self: LightTask, payload: TakeBack) -> dict[str, bool]:
    """Undo a step of the same workflow; what was never done needs no undoing."""
    _spend(self, payload.seconds)
    newcomers = _newcomers()
    if payload.what == "account":
        return {"taken_back": newcomers.remove(payload.email, workflow=self.workflow)}
    return {"taken_back": newcomers.take_back(payload.email, payload.what, workflow=self.workflow)}


def _newcomers() -> NewcomerRepository:
    return NewcomerRepository(worker_context().database)


def _give(task: Task, account: str, what: str) -> str:
    number = _newcomers().provide(account, what, f"{what}-{task.request.id[:8]}", workflow=task.workflow)
    if number is None:
        raise NoAccountError(f"{account} has no account of this workflow.")
    return number


def _spend(task: Task, seconds: float) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, SLICE))
        task.progress(100 - 100 * left / seconds, 100)
