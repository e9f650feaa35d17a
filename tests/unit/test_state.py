import math
from pathlib import Path
from typing import Any

import orjson
import pytest

import app.engine.state as state_module
from app.engine.message import Message
from app.engine.record import (
    RESULT_MAX_DEPTH,
    document,
    encode_result,
    error_document,
    moment,
    progress_of,
    record_key,
    waiting_key,
)
from app.engine.state import SCRIPTS
from app.models import TaskStatus

ADDING = {"create", "reopen"}  # what a full Redis may refuse
LUA = Path(state_module.__file__).with_name("lua")

NEW = {
    "name": "heavy.process_data",
    "status": "PENDING",
    "queue": "heavy",
    "payload": "{}",
    "request_id": "r-1",
    "owner": "key-1",
    "digest": "d",
    "epoch": "1",
    "retries": "0",
    "attempts": "0",
    "version": "1",
    "created_at": "1700000000123",
    "lease": "1700000005123",
    "lease_by": "p",
    "publishes": "1",
}
ENDED = {
    **NEW,
    "status": "SUCCESS",
    "attempts": "2",
    "current": "3",
    "total": "3",
    "result": '{"sum":[1,2.5,null]}',
    "started_at": "1700000001000",
    "finished_at": "1700000002999",
}


def test_every_script_file_is_registered_and_every_script_has_a_file():
    assert {path.stem for path in LUA.glob("*.lua")} == {*SCRIPTS, "prelude"}


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_a_script_has_the_prelude_and_its_own_text(name: str):
    text = SCRIPTS[name]
    prelude, own = (LUA / "prelude.lua").read_text(), (LUA / f"{name}.lua").read_text()
    assert text.endswith(prelude + own)
    # Redis reads flags in the very first line only.
    assert text.startswith("#!lua flags=allow-oom\n") == (name not in ADDING)
    assert text.count("#!lua") == (name not in ADDING)


INTERNAL = {"owner", "digest", "epoch", "version"}


def test_a_new_record_reads_as_a_document():
    assert document("t-1", NEW) == {
        "task_id": "t-1",
        "name": "heavy.process_data",
        "status": "PENDING",
        "progress": None,
        "result": None,
        "error": None,
        "attempts": 0,
        "queue": "heavy",
        "request_id": "r-1",
        "workflow": "",
        "created_at": "2023-11-14T22:13:20.123Z",
        "started_at": None,
        "finished_at": None,
        "owner": "key-1",
        "digest": "d",
        "epoch": 1,
        "version": 1,
    }


def test_an_ended_record_reads_with_its_result_and_times():
    read = document("t-1", ENDED)
    assert read["result"] == {"sum": [1, 2.5, None]}
    assert read["progress"] == {"current": 3, "total": 3, "progress": 100.0}
    assert read["attempts"] == 2
    assert (read["started_at"], read["finished_at"]) == ("2023-11-14T22:13:21.000Z", "2023-11-14T22:13:22.999Z")


def test_a_failed_record_reads_with_its_error():
    error = error_document("time_limit_exceeded", "The task ran longer than it may.")
    read = document("t-1", {**NEW, "status": "FAILURE", "error": orjson.dumps(error).decode()})
    assert read["error"] == {"type": "time_limit_exceeded", "message": "The task ran longer than it may."}
    assert read["result"] is None


@pytest.mark.parametrize("result", [None, False, 0, "", [], {"é😀": [1.5, "\0"]}, 2**63, -(10**40)])
def test_a_result_reads_as_it_was(result: Any):
    record = {**ENDED, "result": encode_result(result).decode()}
    assert document("t-1", record)["result"] == result


@pytest.mark.parametrize("result", [{1}, object(), b"x", math.nan, [math.inf], "\ud800"])
def test_a_result_that_json_cannot_say_is_refused(result: Any):
    with pytest.raises((TypeError, ValueError)):
        encode_result(result)


@pytest.mark.parametrize("record", [NEW, ENDED])
def test_documents_are_what_the_api_answers(record: dict[str, str]):
    read = document("t-1", record)
    shown = {name: value for name, value in read.items() if name not in INTERNAL}
    assert TaskStatus.model_validate(read).model_dump() == shown


def test_times_have_milliseconds_and_z():
    assert moment("0") == "1970-01-01T00:00:00.000Z"
    assert moment(None) is None


def test_no_millisecond_is_lost_to_rounding():
    assert [moment(str(1_700_000_000_000 + part)) for part in range(1000)] == [
        f"2023-11-14T22:13:20.{part:03}Z" for part in range(1000)
    ]


@pytest.mark.parametrize(
    ("current", "total", "percent"), [(0, 3, 0.0), (1, 3, 33.3), (2, 3, 66.7), (3, 3, 100.0), (0, 0, 100.0)]
)
def test_progress_is_in_percent(current: int, total: int, percent: float):
    assert progress_of({"current": str(current), "total": str(total)}) == {
        "current": current,
        "total": total,
        "progress": percent,
    }


def test_a_record_without_progress_has_none():
    assert progress_of(NEW) is None


def test_an_error_message_is_cut():
    assert error_document("kind", "x" * 1001) == {"type": "kind", "message": "x" * 1000}
    assert error_document("kind", "é" * 1000)["message"] == "é" * 1000


@pytest.mark.parametrize("message", ["a\ud800b", "\udfff", "x" * 999 + "\ud83d\ude00"])
def test_an_error_message_can_always_be_encoded(message: str):
    read = orjson.loads(orjson.dumps(error_document("kind", message)))
    assert len(read["message"]) == min(len(message), 1000)
    assert "?" in read["message"]


def test_keys():
    assert record_key("t-1") == "task:t-1"
    assert waiting_key("heavy.high") == "queue:heavy.high:waiting"


def test_a_message_lists_the_fields_of_its_record_in_pairs():
    message = Message("t-1", "light.count_words", "light", {"text": "é"}, digest="d", request_id="r-1")
    fields = message.fields()
    assert dict(zip(fields[::2], fields[1::2], strict=True)) == {
        "name": "light.count_words",
        "queue": "light",
        "payload": '{"text":"é"}'.encode(),
        "request_id": "r-1",
        "owner": "",
        "workflow": "",
    }


def nested(levels: int) -> Any:
    value: Any = 1
    for number in range(levels):
        value = [value] if number % 2 else {"a": value}
    return value


def test_a_result_may_be_nested_and_not_without_end():
    assert encode_result(nested(RESULT_MAX_DEPTH))
    for levels in (RESULT_MAX_DEPTH + 1, 10_000):
        with pytest.raises(ValueError, match="nested"):
            encode_result(nested(levels))


def test_a_result_may_hold_integers_of_any_size():
    assert encode_result({"a": 2**70}) == b'{"a":1180591620717411303424}'
