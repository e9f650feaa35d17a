from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from app.api.schedules import _change, _fields
from app.engine.identity import fire_uuid
from app.models import ScheduleContent

GOOD = {"name": "words", "task": "light.count_words", "payload": {"text": "a"}, "interval": 5}
CRON = {**GOOD, "interval": None, "crontab": "30 2 * * *"}
DUE = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("good", [GOOD, CRON, {**CRON, "timezone": "Europe/Berlin"}, {**CRON, "crontab": "0 0 29 2 *"}])
def test_a_schedule_that_fires_is_taken(good: dict[str, Any]) -> None:
    assert ScheduleContent.model_validate(good).enabled


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "light.unknown"}, "is no task; there are"),
        ({"payload": {}}, "payload.text: Field required"),
        ({"payload": {"text": 1}}, "payload.text: "),
        ({"payload": {"text": "a", "b": 1}}, "payload.b: "),
        ({"interval": 0}, "greater than or equal to 1"),
        ({"interval": 1.5}, "valid integer"),
        ({"interval": None}, "either interval or crontab"),
        ({"crontab": "* * * * *"}, "either interval or crontab"),
        ({"interval": None, "crontab": "61 * * * *"}, "crontab: Bad minute"),
        ({"interval": None, "crontab": "every night"}, "crontab: Wrong number of fields"),
        ({"interval": None, "crontab": "0 0 30 2 *"}, "crontab: Bad day-of-month"),
        ({"interval": None, "crontab": "0 0 */31 2 MON#5"}, "no such time"),
        ({"timezone": "Mars/Olympus"}, "is no time zone"),
        ({"timezone": "../etc/passwd"}, "is no time zone"),
        ({"timezone": "Europe"}, "is no time zone"),
        ({"catch_up": "some"}, "'none', 'last' or 'all'"),
        ({"cron": "x"}, "Extra inputs"),
    ],
)
def test_what_cannot_fire_is_refused_with_the_reason(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ScheduleContent.model_validate({**GOOD, **change})


def changed(**fields: Any) -> dict[str, Any]:
    row = {**_fields(ScheduleContent.model_validate(GOOD)), "anchor": DUE, "next_run": DUE}
    return _change(row, ScheduleContent.model_validate({**GOOD, **fields}))


def test_a_change_that_has_nothing_to_do_with_time_leaves_what_is_due() -> None:
    assert not {"next_run", "anchor"} & changed(name="other", payload={"text": "b"}, catch_up="all").keys()


@pytest.mark.parametrize("fields", [{"interval": 6}, {"interval": None, "crontab": "* * * * *"}])
def test_a_new_timing_counts_from_now(fields: dict[str, Any]) -> None:
    row = changed(**fields)
    assert row["next_run"] > row["anchor"] > DUE


def test_what_is_paused_has_no_next_time() -> None:
    assert changed(enabled=False)["next_run"] is None


def test_a_fire_is_one_task_whoever_makes_it() -> None:
    moment = (DUE + timedelta(seconds=5)).isoformat()
    assert fire_uuid("s", "a", moment) == fire_uuid("s", "a", moment)
    assert len({fire_uuid(*parts, moment) for parts in (("s", "a"), ("s", "b"), ("t", "a"))}) == 3
