import base64
import json
from typing import Any

import pytest

from app.engine.dead_letters import BODY_MAX, HEADERS_MAX, Death, letter, letter_of_stranger, message_of_letter

RECORD = {
    "name": "light.count_words", "status": "FAILURE", "queue": "light", "request_id": "r-1", "owner": "key-1",
    "digest": "d", "attempts": "4", "created_at": "1700000000123", "finished_at": "1700000001000", "epoch": "2",
    "version": "7", "payload": '{"text":"a"}', "reason": "exhausted", "error": '{"type":"OSError","message":"no"}',
}  # fmt: skip


def test_a_letter_tells_what_failed_and_how_to_run_it_again():
    found = letter("t-1", RECORD)
    assert (found["key"], found["reason"], found["attempts"]) == ("t-1:2", "exhausted", 4)
    assert found["error"] == {"type": "OSError", "message": "no"}
    again = message_of_letter(found)
    assert (again.task_id, again.name, again.queue, again.payload) == (
        "t-1", "light.count_words", "light", {"text": "a"},
    )  # fmt: skip
    assert (again.owner, again.digest, again.request_id, again.created_at) == ("key-1", "d", "r-1", 1700000000123)
    assert (again.epoch, again.retries, again.run) == (2, 0, 0)
    assert again.publish != message_of_letter(found).publish


@pytest.mark.parametrize(
    ("headers", "reason", "queue"),
    [
        ({"x-death": [{"reason": "delivery_limit", "queue": "heavy", "count": 1}]}, "delivery_limit", "heavy"),
        (
            {"x-death": [{"reason": "rejected", "queue": "light"}, {"reason": "expired"}]},
            "rejected",
            "light",
        ),
        ({"x-death": []}, "", ""),
        ({"x-death": "odd"}, "", ""),
        ({}, "", ""),
    ],
)
def test_why_and_where_a_message_died(headers: dict[str, Any], reason: str, queue: str):
    assert Death.of(headers) == Death(reason, queue)


def test_what_is_kept_of_a_stranger_is_bounded_and_known_again():
    headers = {"x-death": [{"reason": "rejected", "queue": "light"}], "odd": object, "large": "x" * HEADERS_MAX}
    found = letter_of_stranger(b"\xff" * (BODY_MAX + 5), headers, "it is odd")
    assert found == {**letter_of_stranger(b"\xff" * (BODY_MAX + 5), headers, "it is odd"), "died_at": found["died_at"]}
    assert found["key"] != letter_of_stranger(b"other", headers, "it is odd")["key"]
    assert (found["task_id"], found["reason"], found["queue"]) == (None, "bad_envelope", "light")
    assert len(base64.b64decode(found["message"]["body_base64"])) == BODY_MAX
    assert found["message"]["bytes"] == BODY_MAX + 5
    assert len(found["message"]["headers"]) == HEADERS_MAX
    assert json.dumps(found["error"])
