"""When a schedule fires: a pure function of what it says, so that everybody who asks finds the same times."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from typing import Literal
from zoneinfo import ZoneInfo

from cronsim import CronSim

CATCH_UP_MAX = 100  # fires that are made up for at most
MOMENT = timedelta(milliseconds=1)
FIRST_LOOK = timedelta(minutes=2)  # back, for the latest times of a crontab; each further look goes back twice as far

CatchUp = Literal["none", "last", "all"]


@dataclass(frozen=True, slots=True)
class Timing:
    """Every `interval` seconds from `anchor`, or at the times of `crontab` in `timezone`.

    A time that summer time skips comes an hour later or, of a crontab with wildcards, not at all; one that comes twice
    is the first of the two (as Debian's cron has it, by cronsim).
    """

    anchor: datetime
    interval: int | None = None
    crontab: str | None = None
    timezone: str = "UTC"

    def after(self, moment: datetime) -> datetime | None:
        """The first fire later than `moment`, in UTC; None where there is none."""
        return next(self._times(moment), None)

    def latest(self, since: datetime, until: datetime, most: int) -> list[datetime]:
        """The fires from `since` on and up to `until`, oldest first; of more than `most` the latest."""
        if self.interval is not None:
            step = timedelta(seconds=self.interval)
            last = (until - self.anchor) // step
            first = max(-((self.anchor - since) // step), last - most + 1, 1)
            return [self.anchor + number * step for number in range(first, last + 1)]
        look, found = FIRST_LOOK, list[datetime]()
        while True:
            begin = max(since - MOMENT, until - look)
            found = list(takewhile(lambda time: time <= until, self._times(begin)))
            if len(found) >= most or begin < since:
                return found[-most:]
            look *= 2

    def _times(self, moment: datetime) -> Iterator[datetime]:
        if self.interval is not None:
            step = timedelta(seconds=self.interval)
            number = max((moment - self.anchor) // step + 1, 1)
            while True:
                yield self.anchor + number * step
                number += 1
        local = CronSim(str(self.crontab), moment.astimezone(ZoneInfo(self.timezone)))
        before = moment
        for time in local:
            # Where the clock is put back, a local time may be an earlier moment, or the same one again.
            if (found := time.astimezone(UTC)) > before:
                yield found
                before = found


def planned(timing: Timing, next_run: datetime, now: datetime, catch_up: CatchUp, grace: float) -> list[datetime]:
    """The fires that are to be made at `now` by a schedule that was to fire next at `next_run`, oldest first.

    A fire is late by at most `grace` seconds, or missed. Late ones are all made; of missed ones `catch_up` says: none,
    the last one (unless a later one is only late), or all, which are at most `CATCH_UP_MAX`.
    """
    horizon = now - timedelta(seconds=grace)
    late = timing.latest(max(next_run, horizon), now, int(grace) + 1)
    if next_run >= horizon or catch_up == "none" or (catch_up == "last" and late):
        return late
    missed = timing.latest(next_run, horizon - MOMENT, 1 if catch_up == "last" else CATCH_UP_MAX)
    return missed + late
