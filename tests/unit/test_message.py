import json
from dataclasses import replace
from typing import Any

import pytest

from app.engine.message import Message, body_fault, header_fault, of_headers
from app.engine.publisher import envelope

MESSAGE = Message(
    task_id="t-1",
    name="light.count_words",
    queue="light",
    payload={"text": "é"},
    digest="d",
    request_id="r-1",
    owner="key-1",
    epoch=3,
    retries=2,
    publish="p-1",
    created_at=7,
    workflow="w-1",
)
HEADERS: dict[str, Any] = dict(envelope(MESSAGE).headers)
BODY = envelope(MESSAGE).body


def test_a_message_is_read_as_it_was_sent():
    assert of_headers(HEADERS, BODY) == MESSAGE


def test_a_message_of_an_older_version_is_of_no_workflow():
    record = {name: value for name, value in HEADERS["record"].items() if name != "workflow"}
    assert of_headers({**HEADERS, "record": record}, BODY) == replace(MESSAGE, workflow="")


@pytest.mark.parametrize(
    "change",
    [
        {"id": None},
        {"id": ""},
        {"id": 7},
        {"task": ["a"]},
        {"timelimit": "soon"},
        {"timelimit": [1]},
        {"timelimit": ["a", 1]},
        {"timelimit": {"soft": 1}},
    ],
)
def test_headers_over_which_a_worker_would_end_are_found(change: dict[str, Any]):
    assert header_fault({**HEADERS, **change}) is not None
    with pytest.raises(ValueError, match="its header"):
        of_headers({**HEADERS, **change}, BODY)


@pytest.mark.parametrize("headers", [HEADERS, {"id": "i", "task": "t"}, {**HEADERS, "timelimit": [1, 2.5]}])
def test_headers_of_celery_are_fine(headers: dict[str, Any]):
    assert header_fault(headers) is None


def test_no_headers_at_all():
    assert header_fault(None) == "it has no headers"


@pytest.mark.parametrize("body", [b"", b"\xff", b"{", b"1", b"[[],{}]", b"[{},{},{}]", b"[[],[],{}]", b"[[],{},1]"])
def test_bodies_over_which_a_worker_would_end_are_found(body: bytes):
    assert body_fault(body) is not None


@pytest.mark.parametrize("body", [b"[[],{},{}]", b'[[1],{"a":2},null]'])
def test_bodies_of_celery_are_fine(body: bytes):
    assert body_fault(body) is None


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({name: value for name, value in HEADERS.items() if name != "record"}, BODY),
        ({**HEADERS, "record": {}}, BODY),
        ({**HEADERS, "record": "x"}, BODY),
        (HEADERS, b"[[],{},{}]"),
    ],
)
def test_a_task_without_a_record_is_a_stranger(headers: dict[str, Any], body: bytes):
    with pytest.raises(ValueError, match="record"):
        of_headers(headers, body)


def test_a_record_makes_the_message_of_its_next_attempt():
    record = {
        "name": MESSAGE.name, "queue": "light", "payload": json.dumps(MESSAGE.payload), "digest": "d",
        "request_id": "r-1", "owner": "key-1", "epoch": "3", "retries": "2", "created_at": "7", "status": "RETRY",
        "workflow": "w-1",
    }  # fmt: skip
    made = Message.of_record("t-1", record)
    assert made.publish not in ("", MESSAGE.publish)
    assert replace(made, publish="p-1") == MESSAGE
    older = Message.of_record("t-1", {name: value for name, value in record.items() if name != "workflow"})
    assert older.workflow == ""
