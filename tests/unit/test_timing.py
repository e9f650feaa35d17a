"""When schedules fire, summer time included, and which fires are made up for."""

from datetime import UTC, datetime, timedelta

import pytest

from app.engine.timing import CATCH_UP_MAX, Timing, planned

NOON = datetime(2026, 6, 1, 12, 0, 0, 250_000, tzinfo=UTC)
BERLIN = "Europe/Berlin"


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def times(timing: Timing, moment: datetime, count: int) -> list[datetime]:
    found = []
    for _ in range(count):
        moment = timing.after(moment)
        found.append(moment)
    return found


def test_an_interval_counts_from_its_anchor_however_late_one_asks() -> None:
    timing = Timing(NOON, interval=10)
    assert timing.after(NOON) == NOON + timedelta(seconds=10)
    assert timing.after(NOON + timedelta(seconds=10)) == NOON + timedelta(seconds=20)
    assert timing.after(NOON + timedelta(seconds=1_234.5)) == NOON + timedelta(seconds=1_240)
    assert timing.after(NOON - timedelta(days=1)) == NOON + timedelta(seconds=10)


def test_a_crontab_is_read_in_its_zone_summer_and_winter() -> None:
    timing = Timing(NOON, crontab="30 8 * * *", timezone=BERLIN)
    assert times(timing, at("2026-10-23T12:00"), 3) == [
        at("2026-10-24T06:30"),
        at("2026-10-25T07:30"),  # from here on an hour later by UTC
        at("2026-10-26T07:30"),
    ]


def test_an_hour_that_is_left_out_fires_once_after_it() -> None:
    timing = Timing(NOON, crontab="30 2 * * *", timezone=BERLIN)
    assert times(timing, at("2026-03-28T00:00"), 3) == [
        at("2026-03-28T01:30"),
        at("2026-03-29T01:00"),  # 02:30 is not there: 03:00 of summer time
        at("2026-03-30T00:30"),
    ]


def test_an_hour_that_comes_twice_fires_once() -> None:
    timing = Timing(NOON, crontab="30 2 * * *", timezone=BERLIN)
    assert times(timing, at("2026-10-24T12:00"), 2) == [at("2026-10-25T00:30"), at("2026-10-26T01:30")]
    # Also for who asks between the two.
    assert timing.after(at("2026-10-25T00:45")) == at("2026-10-26T01:30")
    assert timing.after(at("2026-10-25T01:15")) == at("2026-10-26T01:30")


def test_what_fires_all_the_time_goes_on_through_both_hours() -> None:
    timing = Timing(NOON, crontab="*/30 * * * *", timezone=BERLIN)
    found = times(timing, at("2026-10-24T23:45"), 6)
    assert found == [at("2026-10-25T00:00") + n * timedelta(minutes=30) for n in range(6)]
    found = times(timing, at("2026-03-29T00:00"), 4)
    assert found == [at("2026-03-29T00:30") + n * timedelta(minutes=30) for n in range(4)]


@pytest.mark.parametrize("moment", ["2026-03-29T00:59:59", "2026-10-25T00:29:59", "2026-10-25T01:29:59"])
def test_no_fire_is_at_or_before_the_moment_asked_for(moment: str) -> None:
    for crontab in ("30 2 * * *", "*/7 1-3 * * *", "0 * * * *", "15,45 2 * * SUN", "*/10 * * * * *"):
        timing = Timing(NOON, crontab=crontab, timezone=BERLIN)
        found = times(timing, at(moment), 200)
        assert found == sorted(set(found))
        assert found[0] > at(moment)


@pytest.mark.parametrize(
    "timing",
    [
        Timing(NOON - timedelta(days=400), interval=7),
        Timing(NOON, crontab="*/3 * * * *", timezone=BERLIN),
        Timing(NOON, crontab="0 9 * * MON-FRI", timezone="America/New_York"),
        Timing(NOON, crontab="*/20 * * * * *"),
    ],
)
@pytest.mark.parametrize("back", [timedelta(seconds=50), timedelta(hours=3), timedelta(days=2)])
def test_the_latest_times_are_the_end_of_all_times(timing: Timing, back: timedelta) -> None:
    every, moment = [], NOON - back - timedelta(milliseconds=1)
    while (moment := timing.after(moment)) <= NOON and len(every) < 100_000:
        every.append(moment)
    assert timing.latest(NOON - back, NOON, 30) == every[-30:]
    assert timing.latest(NOON - back, NOON, 1) == every[-1:]


def test_both_ends_count() -> None:
    timing = Timing(NOON, interval=10)
    first, last = NOON + timedelta(seconds=10), NOON + timedelta(seconds=40)
    assert timing.latest(first, last, 99) == [NOON + timedelta(seconds=10 * n) for n in (1, 2, 3, 4)]
    exact = Timing(NOON, crontab="0 * * * *")
    assert exact.latest(at("2026-06-01T10:00"), at("2026-06-01T12:00"), 99) == [
        at(f"2026-06-01T{hour}:00") for hour in (10, 11, 12)
    ]


EVERY = Timing(NOON, interval=10)


def after(*seconds: int) -> list[datetime]:
    return [NOON + timedelta(seconds=second) for second in seconds]


@pytest.mark.parametrize("catch_up", ["none", "last", "all"])
def test_what_is_only_late_is_made_whatever_catch_up_says(catch_up: str) -> None:
    now = NOON + timedelta(seconds=35)
    assert planned(EVERY, *after(10), now, catch_up, grace=30) == after(10, 20, 30)


@pytest.mark.parametrize(("catch_up", "made"), [("none", []), ("last", [3600]), ("all", [1800, 3600])])
def test_what_was_missed_is_made_as_catch_up_says(catch_up: str, made: list[int]) -> None:
    half = Timing(NOON, interval=1800)
    now = NOON + timedelta(seconds=3600 + 600)
    assert planned(half, *after(1800), now, catch_up, grace=30) == after(*made)


def test_the_last_one_is_not_made_up_for_where_a_later_one_is_only_late() -> None:
    now = NOON + timedelta(seconds=125)
    assert planned(EVERY, *after(10), now, "last", grace=30) == after(100, 110, 120)
    assert planned(EVERY, *after(10), now, "all", grace=30) == after(*range(10, 130, 10))


def test_all_has_a_bound() -> None:
    second = Timing(NOON, interval=1)
    now = NOON + timedelta(days=30)
    made = planned(second, *after(1), now, "all", grace=10)
    assert made[-1] == now
    assert len(made) == CATCH_UP_MAX + 11
    assert made == sorted(set(made))


@pytest.mark.parametrize("crontab", ["* * * * *", "* * * * * *"])
def test_a_month_of_a_crontab_is_caught_up_without_looking_at_all_of_it(crontab: str) -> None:
    timing = Timing(NOON, crontab=crontab, timezone=BERLIN)
    made = planned(timing, NOON, NOON + timedelta(days=30), "all", grace=30)
    assert CATCH_UP_MAX <= len(made) <= CATCH_UP_MAX + 31
