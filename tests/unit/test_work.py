import hashlib
import hmac
import importlib
from typing import Any

import pytest
from pydantic import ValidationError

import app.engine.task as task_module
from app.celery_app import celery, task_modules
from app.contracts import TASKS, TaskName
from app.tasks.heavy import derive, process_data
from app.tasks.light import count_words


def pbkdf2(password: bytes, salt: bytes, rounds: int, size: int) -> bytes:
    """PBKDF2-HMAC-SHA-256 written out as RFC 8018, section 5.2, has it; for at most one block."""
    block = hmac.digest(password, salt + (1).to_bytes(4, "big"), "sha256")
    derived = int.from_bytes(block, "big")
    for _ in range(rounds - 1):
        block = hmac.digest(password, block, "sha256")
        derived ^= int.from_bytes(block, "big")
    return derived.to_bytes(32, "big")[:size]


def item(data: str, index: int) -> bytes:
    return pbkdf2(data.encode(), index.to_bytes(8, "big"), 1000, 16)


@pytest.fixture
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a task looks for the message that it came by: there is none."""

    def fail(*_: Any) -> None:
        pytest.fail("there is no message outside a worker")

    monkeypatch.setattr(task_module, "message_of", fail)


@pytest.mark.parametrize(("data", "index"), [("hello", 0), ("hello", 1), ("", 2), ("é😀", 256), ("x" * 100, 2**40)])
def test_derives_by_pbkdf2(data: str, index: int):
    assert derive(data.encode(), index) == item(data, index)


@pytest.mark.usefixtures("no_worker")
def test_process_data_answers_items_and_a_checksum_over_them():
    answer = process_data(payload={"data": "hé", "iterations": 3})
    items = [item("hé", index) for index in range(3)]
    assert answer == {
        "processed_items": [value.hex() for value in items],
        "total_processed": 3,
        "checksum": hashlib.sha256(b"".join(items)).hexdigest(),
    }


@pytest.mark.usefixtures("no_worker")
def test_process_data_shows_the_first_100_items_and_checks_all(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("app.tasks.heavy.derive", lambda data, index: data + index.to_bytes(2, "big"))
    answer = process_data(payload={"data": "x", "iterations": 150})
    items = [b"x" + index.to_bytes(2, "big") for index in range(150)]
    assert answer["processed_items"] == [value.hex() for value in items[:100]]
    assert answer["total_processed"] == 150
    assert answer["checksum"] == hashlib.sha256(b"".join(items)).hexdigest()


@pytest.mark.usefixtures("no_worker")
@pytest.mark.parametrize(
    ("text", "words", "lines"),
    [("", 0, 0), ("one", 1, 1), ("to be\n or  not\tto be\n", 6, 2), ("\n\n", 0, 2), ("é 😀\r\nx", 3, 2)],
)
def test_count_words_counts_words_lines_and_characters(text: str, words: int, lines: int):
    assert count_words(payload={"text": text}) == {"words": words, "lines": lines, "characters": len(text)}


@pytest.mark.usefixtures("no_worker")
@pytest.mark.parametrize("task", [process_data, count_words])
def test_progress_does_nothing_outside_a_worker(task: Any):
    task.progress(0, 2)
    task.progress(2, 2)


@pytest.mark.parametrize(
    "payload", [{"data": "x", "iterations": 0}, {"data": "x"}, {"data": "x", "iterations": 1, "y": 1}]
)
def test_a_payload_that_does_not_fit_its_schema_is_refused(payload: dict[str, Any]):
    with pytest.raises(ValidationError):
        process_data(payload=payload)


def test_every_contract_has_its_task():
    for name in task_modules():
        importlib.import_module(name)
    assert {name for name in celery.tasks if not name.startswith(("celery.", "test."))} == set(TASKS) == set(TaskName)


def test_modules_of_tasks_are_found_by_themselves():
    assert {"app.tasks.heavy", "app.tasks.light"} <= set(task_modules())
    assert "app.tasks.__init__" not in task_modules()


def test_a_worker_does_not_start_without_a_task_of_the_contracts(monkeypatch: pytest.MonkeyPatch):
    worker = importlib.import_module("app.worker")
    worker.app.loader.import_default_modules()
    worker.refuse_missing_tasks()
    monkeypatch.setitem(TASKS, "light.forgotten", TASKS[TaskName.COUNT_WORDS])
    with pytest.raises(SystemExit, match=r"light\.forgotten"):
        worker.refuse_missing_tasks()
