"""What is next in a workflow: a pure function of its document and of what is known of its tasks.

A member is WAITING until it is released, then PENDING until its task has ended; one that a stopped workflow never
released is SKIPPED at the end. An undo is there from its release on.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import structlog

from app.contracts import TASKS, Payload, Queue
from app.engine.record import FINAL, Status, encode_result, error_document
from app.engine.workflows import Flow, Results, Step, Undo

log = structlog.get_logger(__name__)

RESULTS_MAX = 4 * 1024 * 1024  # characters of JSON: with 2,000 errors of 1,000 characters a document stays below 16 MB
OUTCOME_MAX = 262_144  # bytes

Document = Mapping[str, Any]


class Stage(StrEnum):
    """The states of a workflow. PENDING → STARTED → (COMPENSATING) → SUCCESS | FAILURE | CANCELLED."""

    PENDING = "PENDING"
    STARTED = "STARTED"
    COMPENSATING = "COMPENSATING"
    SUCCESS = "SUCCESS"
    FAILURE = "FAILURE"
    CANCELLED = "CANCELLED"


ENDED = frozenset({Stage.SUCCESS, Stage.FAILURE, Stage.CANCELLED})
WAITING, SKIPPED = "WAITING", "SKIPPED"
NOT_COMPENSATED = "not_compensated"  # the kind of failure of a workflow that was only cancelled


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a task; `result` is JSON."""

    status: str
    attempts: int = 0
    result: str | None = None
    error: Mapping[str, str] | None = None
    started_at: str | None = None
    finished_at: str | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """A task of a workflow, with all that it takes to submit or cancel it."""

    task_id: str
    task: Any
    queue: Queue
    payload: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Plan:
    """What is next: the document's new values, and then, once these are written, what to do with tasks.

    `release`: to be submitted, for the first time. `unknown`: released before, but no server knows of them.
    `stop`: to be cancelled. `stopping`: no member is to run any more.
    """

    values: dict[str, Any] = field(default_factory=dict)
    release: list[Call] = field(default_factory=list)
    unknown: list[Call] = field(default_factory=list)
    stop: list[Call] = field(default_factory=list)
    stopping: bool = False


def opening(flow: Flow, task_id: Callable[[str], str]) -> dict[str, Any]:
    """The members of a new workflow; `task_id` makes an id of a step's name."""
    return {name: _task(task_id(name), step.task, WAITING) for name, step in flow.steps.items()}


def decide(
    flow: Flow,
    outcome: Callable[[Results], Any],
    document: Document,
    seen: Mapping[str, Seen],
    undo_id: Callable[[str], str],
) -> Plan:
    """What is next in the workflow of `document`, which has not ended. `undo_id` makes an id of a step's name.

    `seen` has what is known of tasks by id: nothing where no server knows of one.
    """
    return _Board(flow, outcome, document, seen, undo_id).plan()


class _Board:
    """A workflow's state while it is decided on."""

    def __init__(
        self,
        flow: Flow,
        outcome: Callable[[Results], Any],
        document: Document,
        seen: Mapping[str, Seen],
        undo_id: Callable[[str], str],
    ) -> None:
        self._flow = flow
        self._outcome = outcome
        self._document = document
        self._seen = seen
        self._undo_id = undo_id
        self._members = {name: _observed(one, seen) for name, one in document["members"].items()}
        self._undos = {name: _observed(one, seen) for name, one in document["compensations"].items()}
        self._error: Mapping[str, Any] | None = document["error"]
        self._plan = Plan()

    def plan(self) -> Plan:
        self._notice_failure()
        if not self._stopping:
            self._go_on()
        if self._stopping:
            self._turn_back()
        self._compare()
        return self._plan

    @property
    def _stopping(self) -> bool:
        return bool(self._document["cancel"]) or self._error is not None

    def _fail(self, kind: str, message: str, member: str | None) -> None:
        if self._error is None:
            self._error = {**error_document(kind, message), "member": member}

    def _notice_failure(self) -> None:
        ended = [(name, one) for name, one in self._members.items() if one["status"] in ("FAILURE", "CANCELLED")]
        # What failed first is the reason; one that a client cancelled counts as failed, after those that did.
        ended.sort(key=lambda row: (row[1]["status"] != Status.FAILURE, row[1]["finished_at"] or ""))
        if not self._document["cancel"]:
            for name, one in ended[:1]:
                told = one["error"] or error_document("cancelled", "The task was cancelled.")
                self._fail(told["type"], told["message"], name)
        size = 0
        for name, one in self._members.items():
            size += len(one["result"] or "")
            if size > RESULTS_MAX:
                one["result"] = None
                self._fail("results_too_large", f"The results of all members exceed {RESULTS_MAX} characters.", name)

    def _go_on(self) -> None:
        self._plan.values["status"] = Stage.STARTED
        for name, step in self._flow.steps.items():
            one = self._members[name]
            ready = one["status"] == WAITING and all(self._succeeded(before) for before in step.after)
            if not ready and not self._lost(one):
                continue
            try:
                call = self._call(name, step, one["task_id"])
            except BadPayloadError as error:
                self._fail("bad_payload", str(error), name)
                return
            (self._plan.release if ready else self._plan.unknown).append(call)
            one["status"] = Status.PENDING
        if all(map(self._succeeded, self._members)):
            self._succeed()

    def _succeeded(self, name: str) -> bool:
        return bool(self._members[name]["status"] == Status.SUCCESS)

    def _succeed(self) -> None:
        try:
            result = encode_result(self._outcome(self._flow.results(self._members)))
        except Exception as error:
            # A mistake of the definition, or results that it does not expect.
            log.exception("a workflow's outcome cannot be made", workflow_id=self._document["workflow_id"])
            self._fail("no_outcome", f"Its result cannot be made: {type(error).__name__}: {error}", None)
            return
        if len(result) > OUTCOME_MAX:
            self._fail("result_too_large", f"Its result has {len(result)} bytes, {OUTCOME_MAX} are allowed.", None)
            return
        self._plan.values |= {"status": Stage.SUCCESS, "result": result.decode()}

    def _turn_back(self) -> None:
        for name, one in self._members.items():
            if self._document["members"][name]["status"] == WAITING:
                one["status"] = WAITING  # what this plan was about to release
        self._plan = Plan(values={"status": Stage.COMPENSATING}, stopping=True)
        if not self._stop_members() and self._take_back():
            self._end()

    def _stop_members(self) -> bool:
        """Have the open members end; answers whether there are any."""
        for name, one in self._members.items():
            if one["status"] != Status.PENDING:
                continue
            step = self._flow.steps[name]
            call = Call(one["task_id"], step.task, _queue(step))
            if self._lost(one):
                # Its digest must be that of whoever may be about to submit it.
                with suppress(BadPayloadError):
                    call = self._call(name, step, one["task_id"])
                self._plan.unknown.append(call)
            else:
                self._plan.stop.append(call)
        return bool(self._plan.unknown or self._plan.stop)

    def _take_back(self) -> bool:
        """Run each undo once those of all members that came later have ended; answers whether all have."""
        clear: dict[str, bool] = {}  # whether a member and all that came after it have been taken back
        later: dict[str, list[str]] = {name: [] for name in self._flow.steps}
        for name, step in reversed(self._flow.steps.items()):
            ready = all(clear[one] for one in later[name])
            clear[name] = ready and self._undone(name, step)
            for before in step.after:
                later[before].append(name)
        return all(clear.values())

    def _undone(self, name: str, step: Step) -> bool:
        """Run the undo of a member, if it has one and was released; answers whether it has ended, or need not be."""
        if step.undo is None or self._members[name]["status"] == WAITING:
            return True
        one = self._undos.get(name)
        if one is not None and one["status"] in FINAL:
            return True
        new = one is None
        if one is None:
            one = self._undos[name] = _task(self._undo_id(name), step.undo.task, Status.PENDING)
        elif not self._lost(one):
            return False
        try:
            call = self._call(name, step.undo, one["task_id"])
        except BadPayloadError as error:
            one |= {"status": Status.FAILURE, "error": error_document("bad_payload", str(error))}
            return True
        (self._plan.release if new else self._plan.unknown).append(call)
        return False

    def _end(self) -> None:
        failed = [name for name, one in self._undos.items() if one["status"] != Status.SUCCESS]
        if failed:
            shown = ", ".join(failed[:20])
            self._fail(NOT_COMPENSATED, f"It was cancelled, but what these did could not be taken back: {shown}", None)
        elif self._error is not None and self._error["type"] == NOT_COMPENSATED:
            self._error = None  # an operator had the undo run again
        for one in self._members.values():
            if one["status"] == WAITING:
                one["status"] = SKIPPED
        self._plan.values["status"] = Stage.FAILURE if self._error is not None else Stage.CANCELLED
        self._plan.values["uncompensated"] = failed

    def _lost(self, one: Mapping[str, Any]) -> bool:
        return one["status"] == Status.PENDING and one["task_id"] not in self._seen

    def _call(self, name: str, what: Step | Undo, task_id: str) -> Call:
        results = self._flow.results(self._members, name if isinstance(what, Step) else None)
        try:
            payload: Payload = what.payload(results)
            return Call(task_id, what.task, _queue(what), payload.model_dump(mode="json"))
        except Exception as error:
            log.exception("a payload cannot be made", workflow_id=self._document["workflow_id"], member=name)
            raise BadPayloadError(f"The payload of {name} cannot be made: {type(error).__name__}: {error}") from error

    def _compare(self) -> None:
        """Put into the plan what has changed."""
        values = self._plan.values
        for place, present in (("members", self._members), ("compensations", self._undos)):
            before = self._document[place]
            values |= {f"{place}.{name}": one for name, one in present.items() if one != before.get(name)}
        values["error"] = self._error
        for name in [name for name, value in values.items() if "." not in name and value == self._document.get(name)]:
            del values[name]


class BadPayloadError(Exception):
    """A payload cannot be made of the results: a mistake of the definition, or results that it does not expect."""


def _queue(what: Step | Undo) -> Queue:
    return what.queue or TASKS[what.task].queue


def _task(task_id: str, name: str, status: str) -> dict[str, Any]:
    return {
        "task_id": task_id, "task": str(name), "status": str(status), "attempts": 0, "result": None, "error": None,
        "started_at": None, "finished_at": None,
    }  # fmt: skip


def _observed(one: Mapping[str, Any], seen: Mapping[str, Seen]) -> dict[str, Any]:
    """A task as the document has it, or as it was seen to have ended."""
    found = seen.get(one["task_id"])
    if one["status"] in FINAL or found is None or found.status not in FINAL:
        return dict(one)
    error = dict(found.error) if found.error is not None and found.status != Status.SUCCESS else None
    return {
        **one, "status": str(found.status), "attempts": found.attempts, "result": found.result, "error": error,
        "started_at": found.started_at, "finished_at": found.finished_at,
    }  # fmt: skip
