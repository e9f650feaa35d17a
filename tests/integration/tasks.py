"""Tasks that only tests need: they fail, wait and return what they are told to."""

import os
import signal
import time
from typing import Any

from celery import Signature, chord
from celery.exceptions import SoftTimeLimitExceeded

from app.celery_app import celery
from app.contracts import Payload
from app.engine.errors import PermanentError
from app.engine.message import RECORD, Message, record_header
from app.engine.task import HeavyTask, LightTask


class Steps(Payload):
    steps: int
    seconds: float = 0.05


class Failures(Payload):
    failures: int
    mark: str = ""


class Stubborn(Payload):
    stubborn: bool


class Late(Payload):
    seconds: float


class Size(Payload):
    size: int


class HopelessError(PermanentError):
    kind = "hopeless"


@celery.task(name="test.steps", base=HeavyTask, bind=True, pydantic=True)
def steps(self: HeavyTask, payload: Steps) -> dict[str, Any]:
    for number in range(payload.steps):
        time.sleep(payload.seconds)
        self.progress(number + 1, payload.steps)
    return {"steps": payload.steps}


@celery.task(name="test.flaky", base=LightTask, bind=True, pydantic=True, backoff_cap=1)
def flaky(self: LightTask, payload: Failures) -> dict[str, Any]:
    if self.request.retries < payload.failures:
        raise OSError(f"attempt {self.request.retries + 1} fails")
    return {"retries": self.request.retries}


@celery.task(name="test.late", base=HeavyTask, bind=True, pydantic=True, backoff_cap=1)
def late(self: HeavyTask, payload: Late) -> dict[str, Any]:
    time.sleep(payload.seconds)
    if self.request.retries == 0:
        raise OSError("the first attempt fails")
    return {"retries": self.request.retries}


@celery.task(name="test.exhausted", base=LightTask, bind=True, pydantic=True, backoff_cap=1, max_retries=1)
def exhausted(self: LightTask, payload: Failures) -> None:
    raise OSError(f"attempt {self.request.retries + 1} of {payload.failures} fails")


@celery.task(name="test.hopeless", base=LightTask, bind=True, pydantic=True)
def hopeless(self: LightTask, payload: Failures) -> None:
    raise HopelessError(f"nothing helps {self.name} {payload.failures}")


class Effective(HeavyTask):
    """Has an effect that can be counted."""

    abstract = True

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        self.backend.client.rpush(f"effect:{task_id}", "success")


class Hooked(LightTask):
    """Notes in Redis which hooks were called, and fails in each."""

    abstract = True

    def note(self, hook: str, task_id: str) -> None:
        self.backend.client.rpush(f"hooks:{task_id}", hook)
        raise OSError("a hook may fail")

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:  # noqa: ARG002  Celery's signature
        self.note("success", task_id)

    def on_retry(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:  # noqa: ARG002
        self.note("retry", task_id)

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:  # noqa: ARG002
        self.note("failure", task_id)


@celery.task(name="test.hooked", base=Hooked, bind=True, pydantic=True, backoff_cap=1, max_retries=1)
def hooked(self: LightTask, payload: Failures) -> str:
    if self.request.retries < payload.failures:
        raise OSError("it fails")
    return self.name


@celery.task(name="test.effect", base=Effective, bind=True, pydantic=True)
def effect(self: HeavyTask, payload: Steps) -> int:
    for number in range(payload.steps):
        time.sleep(payload.seconds)
        self.progress(number + 1, payload.steps)
    return payload.steps


@celery.task(name="test.fragile", base=LightTask, bind=True, pydantic=True)
def fragile(self: LightTask, payload: Failures) -> int:
    """Fails for good for as long as Redis says that it is broken."""
    if self.backend.client.exists(f"fragile:{self.request.id}"):
        raise HopelessError("it is broken")
    return payload.failures


@celery.task(name="test.poison", base=HeavyTask, bind=True, pydantic=True)
def poison(self: HeavyTask, payload: Failures) -> int:
    """Kills its process, as an extension that crashes does, as often as it is told to."""
    starts = self.backend.client.incr(f"poison:{self.request.id}")
    if starts <= payload.failures:
        os.kill(os.getpid(), signal.SIGKILL)
    return starts


@celery.task(name="test.sleep", base=HeavyTask, pydantic=True)
def sleep(payload: Late) -> None:
    """Reports no progress, so that it cannot be cancelled but by ending its process."""
    time.sleep(payload.seconds)


def recorded(name: str, **payload: Any) -> Signature:
    """A signature whose message has a record, as those of our publisher have."""
    message = Message.new(task_id="", name=name, queue="light", payload=payload, digest="", request_id="chord")
    headers = {RECORD: record_header(message)}
    return celery.tasks[name].signature(kwargs={"payload": payload}, queue="light", headers=headers)


@celery.task(name="test.chord", base=LightTask, bind=True, pydantic=True)
def start_chord(self: LightTask, payload: Size) -> str:
    members = [recorded("test.member", size=number).set(immutable=True) for number in range(payload.size)]
    return chord(members, recorded("test.body", size=payload.size)).apply_async(task_id=f"{self.request.id}-body").id


@celery.task(name="test.member", base=Effective, pydantic=True)
def member(payload: Size) -> int:
    time.sleep(payload.size)
    return payload.size


@celery.task(name="test.body", base=LightTask, bind=True, pydantic=True)
def body(self: LightTask, results: list[int], payload: Size) -> list[int]:
    self.backend.client.incr(f"body:{self.request.id}")
    assert len(results) == payload.size
    return results


@celery.task(name="test.endless", base=LightTask, pydantic=True)
def endless(payload: Stubborn) -> None:
    while True:
        try:
            time.sleep(60)
        except SoftTimeLimitExceeded:
            if not payload.stubborn:
                raise


@celery.task(name="test.large", base=LightTask, bind=True, pydantic=True)
def large(self: LightTask, payload: Size) -> str:
    return self.name[0] * payload.size


@celery.task(name="test.odd", base=LightTask, bind=True, pydantic=True)
def odd(self: LightTask, payload: Size) -> dict[str, Any]:
    # JSON that BSON cannot say.
    return {"$big": 2**70 + payload.size, "name": self.name}


@celery.task(name="test.unsayable", base=LightTask, bind=True, pydantic=True)
def unsayable(self: LightTask, payload: Size) -> Any:
    return [{1, 2}, float("nan"), "\ud800"][payload.size], self.name


@celery.task(name="test.noted", base=LightTask, bind=True, pydantic=True)
def noted(self: LightTask, payload: Failures) -> str:
    """Notes that it ran, for the workflow that it is of."""
    self.backend.client.rpush(f"noted:{self.workflow}", payload.mark)
    return payload.mark


@celery.task(name="test.mended", base=LightTask, bind=True, pydantic=True)
def mended(self: LightTask, payload: Failures) -> str:
    """Fails for good for as long as Redis says that what `mark` names is broken."""
    if self.backend.client.exists(f"broken:{payload.mark}"):
        raise HopelessError("it is broken")
    return payload.mark


@celery.task(name="test.paced", base=LightTask, bind=True, pydantic=True, overall_rate=0.5)
def paced(self: LightTask, payload: Size) -> int:
    self.backend.client.rpush("paced", self.request.id)
    return payload.size
