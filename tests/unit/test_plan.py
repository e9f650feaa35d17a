"""What is next in a workflow: the document and what is known of its tasks go in, the new document comes out."""

import json
from copy import deepcopy
from typing import Any

import pytest

from app.contracts import CountWords, Payload, TaskName
from app.engine.plan import RESULTS_MAX, Plan, Seen, decide, opening
from app.engine.workflows import Flow, Results, Step, Undo, chain, chord


def step(name: str, *after: str, undo: bool = True) -> Step:
    def payload(results: Results) -> Payload:
        return CountWords(text=json.dumps(results, sort_keys=True))

    taken_back = Undo(TaskName.COUNT_WORDS, lambda results: CountWords(text=f"undo {name} {sorted(results)}"))
    return Step(name, TaskName.COUNT_WORDS, payload, after, taken_back if undo else None)


class Run:
    """A workflow whose tasks do what they are told, without servers."""

    def __init__(self, *steps: Step, outcome: Any = dict) -> None:
        self.flow = Flow(steps)
        self.outcome = outcome
        self.document: dict[str, Any] = {
            "workflow_id": "w", "status": "PENDING", "cancel": False, "error": None, "result": None,
            "members": opening(self.flow, lambda name: f"do-{name}"), "compensations": {}, "uncompensated": [],
        }  # fmt: skip
        self.known: dict[str, Seen] = {}
        self.plan = Plan()

    def look(self, *, submit: bool = True) -> list[str]:
        """Decide once; answers what was released."""
        before = deepcopy(self.document)
        self.plan = decide(self.flow, self.outcome, self.document, self.known, lambda name: f"undo-{name}")
        assert self.document == before  # nothing is changed but by the plan
        for path, value in self.plan.values.items():
            place, _, name = path.partition(".")
            if name:
                self.document[place][name] = value
            else:
                self.document[place] = value
        if submit:
            self.known |= {call.task_id: Seen("PENDING") for call in self.plan.release}
        return [call.task_id for call in self.plan.release]

    def end(self, task_id: str, status: str = "SUCCESS", *, result: Any = 1, at: str = "t") -> None:
        error = None if status == "SUCCESS" else {"type": "broken", "message": f"{task_id} broke"}
        self.known[task_id] = Seen(
            status, 1, json.dumps(result) if status == "SUCCESS" else None, error, finished_at=at
        )

    def states(self, place: str = "members") -> dict[str, str]:
        return {name: one["status"] for name, one in self.document[place].items()}


DIAMOND = (step("a"), step("b", "a"), step("c", "a"), step("d", "b", "c"))


def test_members_are_released_once_those_before_them_have_succeeded():
    run = Run(*DIAMOND)
    assert run.look() == ["do-a"]
    assert run.document["status"] == "STARTED"
    assert run.look() == []
    run.end("do-a", result="A")
    assert run.look() == ["do-b", "do-c"]
    run.end("do-b", result="B")
    assert run.look() == []
    run.end("do-c", result="C")
    assert run.look() == ["do-d"]
    assert json.loads(run.plan.release[0].payload["text"]) == {"a": "A", "b": "B", "c": "C"}
    run.end("do-d", result="D")
    assert run.look() == []
    assert run.document["status"] == "SUCCESS"
    assert json.loads(run.document["result"]) == {"a": "A", "b": "B", "c": "C", "d": "D"}


def test_a_payload_has_the_results_of_those_before_it_alone():
    run = Run(step("a"), step("x"), step("b", "a"))
    run.look()
    run.end("do-a")
    run.end("do-x")
    run.look()
    assert json.loads(run.plan.release[0].payload["text"]) == {"a": 1}


def test_a_workflow_in_which_nothing_has_happened_changes_nothing():
    run = Run(*DIAMOND)
    run.look()
    run.look()
    assert run.plan == Plan()


def test_what_was_released_and_is_not_known_is_submitted_again():
    run = Run(*DIAMOND)
    run.look(submit=False)
    first = run.plan.release
    assert run.look(submit=False) == []
    assert run.plan.unknown == first
    assert not run.plan.values


def test_a_failure_stops_the_others_and_takes_back_what_was_done_backwards():
    run = Run(*DIAMOND)
    run.look()
    run.end("do-a")
    run.look()
    run.end("do-b", "FAILURE")
    assert run.look() == []
    assert run.document["status"] == "COMPENSATING"
    assert [call.task_id for call in run.plan.stop] == ["do-c"]
    assert run.look() == []  # c runs on
    run.end("do-c")  # and had done it
    assert sorted(run.look()) == ["undo-b", "undo-c"]  # independent of each other, before that of a
    assert run.plan.release[0].payload["text"] == "undo c ['a', 'c']"
    run.end("undo-c")
    assert run.look() == []
    run.end("undo-b")
    assert run.look() == ["undo-a"]
    run.end("undo-a")
    run.look()
    assert run.document["status"] == "FAILURE"
    assert run.document["error"] == {"type": "broken", "message": "do-b broke", "member": "b"}
    assert run.states() == {"a": "SUCCESS", "b": "FAILURE", "c": "SUCCESS", "d": "SKIPPED"}
    assert run.document["uncompensated"] == []


def test_the_first_failure_is_the_reason_and_a_cancelled_member_only_without_one():
    run = Run(step("a"), step("b"), step("c"))
    run.look()
    run.end("do-a", "CANCELLED", at="1")
    run.end("do-b", "FAILURE", at="3")
    run.end("do-c", "FAILURE", at="2")
    run.look()
    assert run.document["error"]["member"] == "c"
    alone = Run(step("a"))
    alone.look()
    alone.end("do-a", "CANCELLED")
    alone.look()
    assert alone.document["error"]["member"] == "a"


def test_an_undo_waits_for_those_of_all_that_came_later_near_and_far():
    run = Run(*chain(step("a"), step("b", undo=False), step("c"), step("d")))
    for name in "abc":
        run.look()
        run.end(f"do-{name}")
    run.look()
    run.end("do-d", "FAILURE")
    for name in "dca":
        assert run.look() == [f"undo-{name}"]
        run.end(f"undo-{name}")
    run.look()
    assert run.document["status"] == "FAILURE"
    assert run.states("compensations") == dict.fromkeys("dca", "SUCCESS")


def test_an_undo_that_fails_keeps_back_no_other_and_is_named():
    run = Run(*chain(step("a"), step("b")))
    run.look()
    run.end("do-a")
    run.look()
    run.end("do-b", "FAILURE")
    run.look()
    run.end("undo-b", "FAILURE")
    assert run.look() == ["undo-a"]
    run.end("undo-a")
    run.look()
    assert (run.document["status"], run.document["uncompensated"]) == ("FAILURE", ["b"])
    assert run.document["error"]["message"] == "do-b broke"


def test_a_cancelled_workflow_takes_back_even_what_has_all_succeeded():
    run = Run(step("a"))
    run.look()
    run.end("do-a")
    run.document["cancel"] = True
    assert run.look() == ["undo-a"]
    run.end("undo-a")
    run.look()
    assert (run.document["status"], run.document["error"]) == ("CANCELLED", None)


def test_a_cancel_that_could_not_be_taken_back_is_a_failure():
    run = Run(step("a"))
    run.look()
    run.document["cancel"] = True
    run.end("do-a", "CANCELLED")
    run.look()
    run.end("undo-a", "FAILURE")
    run.look()
    assert (run.document["status"], run.document["error"]["type"]) == ("FAILURE", "not_compensated")
    # An operator has the undo run again.
    run.document["status"] = "COMPENSATING"
    run.document["compensations"]["a"]["status"] = "PENDING"
    run.end("undo-a")
    run.look()
    assert (run.document["status"], run.document["error"], run.document["uncompensated"]) == ("CANCELLED", None, [])


def test_a_workflow_cancelled_before_it_began_has_done_nothing():
    run = Run(*DIAMOND)
    run.document["cancel"] = True
    assert run.look() == []
    assert run.document["status"] == "CANCELLED"
    assert set(run.states().values()) == {"SKIPPED"}


def test_a_cancel_sees_what_was_released_and_perhaps_never_submitted():
    run = Run(*DIAMOND)
    run.look(submit=False)
    run.document["cancel"] = True
    run.look()
    assert (run.document["status"], run.plan.stopping) == ("COMPENSATING", True)
    assert [call.task_id for call in run.plan.unknown] == ["do-a"]
    assert run.plan.unknown[0].payload  # its digest must be that of who submits it


def broken(_: Results) -> Payload:
    raise KeyError("nothing there")


def test_a_payload_that_cannot_be_made_fails_the_workflow_and_releases_nothing_beside_it():
    run = Run(step("a"), step("b", "a"), Step("c", TaskName.COUNT_WORDS, broken, ("a",)))
    run.look()
    run.end("do-a")
    assert run.look() == ["undo-a"]
    assert run.document["error"]["type"] == "bad_payload"
    assert run.states() == {"a": "SUCCESS", "b": "WAITING", "c": "WAITING"}


def test_an_undo_whose_payload_cannot_be_made_is_not_compensated():
    run = Run(Step("a", TaskName.COUNT_WORDS, lambda _: CountWords(text=""), undo=Undo(TaskName.COUNT_WORDS, broken)))
    run.look()
    run.end("do-a", "FAILURE")
    assert run.look() == []
    assert (run.document["status"], run.document["uncompensated"]) == ("FAILURE", ["a"])


@pytest.mark.parametrize("outcome", [broken, lambda _: {1, 2}, lambda _: "x" * 300_000])
def test_a_result_that_cannot_be_made_or_told_fails_the_workflow(outcome: Any):
    run = Run(step("a"), outcome=outcome)
    run.look()
    run.end("do-a")
    assert run.look() == ["undo-a"]
    assert run.document["error"]["type"] in ("no_outcome", "result_too_large")


def test_results_are_bounded_over_all_members():
    run = Run(step("a"), step("b"))
    run.look()
    run.end("do-a", result="x" * (RESULTS_MAX - 100))
    run.look()
    assert run.document["error"] is None
    run.end("do-b", result="x" * 200)
    run.look()
    assert run.document["error"]["type"] == "results_too_large"
    assert run.document["members"]["b"]["result"] is None


def test_a_chord_of_a_thousand_is_decided_on_in_no_time():
    run = Run(*chord([step(f"m{number}") for number in range(999)], step("last")))
    assert len(run.look()) == 999
    for number in range(999):
        run.end(f"do-m{number}")
    assert run.look() == ["do-last"]


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [step("a"), step("a")],
        [step("b", "a"), step("a")],
        [step("a", "a")],
        [step("a.b")],
        [step("$a")],
        [step(f"m{number}") for number in range(1001)],
    ],
)
def test_what_can_be_no_workflow_is_refused(steps: list[Step]):
    with pytest.raises(ValueError, match=r"no name|come after|comes after|members"):
        Flow(steps)
