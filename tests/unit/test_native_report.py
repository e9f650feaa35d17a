import os

import pytest
from rich.console import Console

from deploy.native import report
from deploy.native.converge import log_since
from deploy.native.demonstration import shortened
from deploy.native.output import Output
from deploy.native.report import Tail, duration, selected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.9, "59s"), (60, "1min 0s"), (3725, "1h 2min"), (90_000, "1d 1h"), (-5, "0s")],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("what", "names"),
    [
        (None, {"api-1", "heavy-1", "light-1", "nginx"}),
        ("api", {"api-1"}),
        ("worker", {"heavy-1", "light-1"}),
        ("heavy-1", {"heavy-1"}),
        ("ap", set()),
    ],
)
def test_logs_are_chosen_by_kind_or_name(what, names):
    assert {name for name in ("api-1", "heavy-1", "light-1", "nginx") if selected(name, what)} == names


def test_a_log_is_followed_line_by_line_and_past_its_rotation(tmp_path):
    path = tmp_path / "api-1.log"
    path.write_text("one\ntwo\nthree\n")
    tail = Tail("api-1", path, lines=2)
    assert list(tail.read()) == ["two", "three"]
    with path.open("a") as log:
        log.write("half")
    assert list(tail.read()) == []
    with path.open("a") as log:
        log.write(" and half\n")
    assert list(tail.read()) == ["half and half"]
    path.rename(tmp_path / "api-1.log.1")
    path.write_text("new\n")
    assert list(tail.read()) == ["new"]
    assert list(tail.read()) == []
    tail.close()


def test_only_what_this_run_has_logged_is_shown(tmp_path):
    log = tmp_path / "redis.log"
    assert log_since(log, 0) == []
    log.write_text("earlier\n\n  \nnow\n")
    assert log_since(log, 8) == ["now"]
    assert log_since(log, 800) == ["earlier", "now"]  # rotated meanwhile


def test_long_lists_of_a_result_are_counted():
    result = {"items": list(range(100)), "few": [1, 2], "in": {"items": ["a"] * 4}, "total": 100}
    assert shortened(result) == {"items": "[100 items]", "few": [1, 2], "in": {"items": "[4 items]"}, "total": 100}


def test_memory_of_a_process_that_is_gone_is_unknown():
    assert report.memory(2**22 + 1) == "-"


def test_a_reader_that_has_gone_is_noticed_without_a_write():
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as file:
        output = Output()
        output.console = Console(file=file)
        output.check_reader()
        os.close(reading)
        with pytest.raises(BrokenPipeError):
            output.check_reader()
