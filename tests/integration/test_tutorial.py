"""The tutorial does on the running stack what it says."""

import pytest

from tests.integration.harness import Stack, command

pytestmark = pytest.mark.integration


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("step", "shown"),
    [
        ("queues", ["heavy.low", "14 of 14 done", "urgent"]),
        ("retries", ["payment RETRY", "SUCCESS, and was charged once"]),
        ("chains", ["undo inventory SUCCESS", "FAILURE:"]),
        ("dead-letters", ["reason permanent", "is SUCCESS now"]),
        ("scaling", ["40 of 40 done", "a second"]),
    ],
)
def test_a_step_shows_what_it_tells_of(stack: Stack, step: str, shown: list[str]) -> None:
    answer = command(stack, "tutorial", "--yes", step)
    assert answer.returncode == 0, answer.stderr
    text = " ".join(answer.stdout.split())
    assert [part for part in shown if part not in text] == []


def test_an_unknown_step_is_a_wrong_call(stack: Stack) -> None:
    answer = command(stack, "tutorial", "nothing")
    assert answer.returncode == 2
    assert "dead-letters" in answer.stderr
