"""The schedule loop: what is due becomes a row, and every row becomes one task.

Two loops may run at once, and one may die anywhere: a fire is known by its schedule and its time. Its row is there
before the schedule moves on, its task's id is made of both, and it is pending until the task is published.
"""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import orjson
import structlog
from cronsim import CronSimError
from pymongo.errors import PyMongoError
from redis.exceptions import RedisError

from app import problems
from app.contracts import TASKS, TaskName
from app.database import Document, FireRepository, ScheduleRepository
from app.database.documents import present
from app.engine.identity import body_digest, fire_uuid
from app.engine.loops import forever
from app.engine.service import Accepted, Order, TaskService
from app.engine.timing import Timing, planned
from app.settings import Settings

log = structlog.get_logger(__name__)

WAITING_MAX = 100  # fires of one schedule that may wait to be published; until then no further ones are planned

BROKEN_PAUSE = timedelta(minutes=1)  # until a schedule that cannot be planned is looked at again


def timing_of(schedule: Mapping[str, Any]) -> Timing:
    """When a schedule's document says that it fires."""
    return Timing(schedule["anchor"], schedule["interval"], schedule["crontab"], schedule["timezone"])


class Schedules:
    """Plans and publishes fires over MongoDB and the tasks' service."""

    def __init__(
        self, schedules: ScheduleRepository, fires: FireRepository, tasks: TaskService, settings: Settings
    ) -> None:
        self._schedules = schedules
        self._fires = fires
        self._tasks = tasks
        self._secret = settings.identity_secret.get_secret_value()
        self._interval = settings.schedule_interval
        self._batch = settings.schedule_batch
        self._grace = settings.schedule_grace

    async def run(self) -> None:
        """Look at what is due until cancelled; servers that are away are waited for."""
        await forever(self._look, "schedules", (RedisError, PyMongoError))

    async def _look(self) -> None:
        if await self.round() < self._batch:
            await asyncio.sleep(self._interval)

    async def round(self) -> int:
        """Plan the fires of the schedules that are due, publish those that wait; answers how many schedules were due.

        Raises `RedisError` or `PyMongoError`; the next round goes on where it was.
        """
        now = present()
        due = await self._schedules.due(now, self._batch)
        for schedule in due:
            try:
                await self._plan(schedule, now)
            except (CronSimError, ValueError, KeyError, OSError) as error:
                # Its time zone is gone, say. The others are not to wait for it.
                log.error("a schedule cannot be planned", schedule=str(schedule["_id"]), error=repr(error))  # noqa: TRY400
                await self._schedules.advance(schedule, next_run=now + BROKEN_PAUSE, last_run=None)
        await self.publish(await self._fires.pending(present(), self._batch))
        return len(due)

    async def _plan(self, schedule: Document, now: datetime) -> None:
        if await self._fires.waiting(schedule["_id"], WAITING_MAX) >= WAITING_MAX:
            # The broker is away, or the queue full: what is not planned in time is missed.
            log.warning("a schedule waits for its fires to be published", schedule=str(schedule["_id"]))
            return
        timing = timing_of(schedule)
        times = planned(timing, schedule["next_run"], now, schedule["catch_up"], self._grace)
        if times:
            await self._fires.add([self._fire(schedule, time) for time in times])
        # Only now: who dies before this leaves a schedule that is still due, and rows that are there already.
        await self._schedules.advance(schedule, next_run=timing.after(now), last_run=times[-1] if times else None)

    def _fire(self, schedule: Document, time: datetime) -> Document:
        schedule_id = schedule["_id"]
        return {
            "schedule_id": schedule_id,
            "fire_time": time,
            "task_id": fire_uuid(self._secret, str(schedule_id), time.isoformat(timespec="milliseconds")),
            "task": schedule["task"],
            "payload": schedule["payload"],
            "owner": schedule["owner"],
        }

    async def publish(self, fires: Sequence[Document]) -> None:
        """Submit the tasks of pending fires; one that was submitted before is found by its id."""
        by_owner = defaultdict(list)
        for fire in fires:
            if fire["task"] in TASKS:
                by_owner[fire["owner"]].append(fire)
            else:
                await self._fires.settle(fire, "refused", "There is no such task any more.")
        for owner, rows in by_owner.items():
            orders = [_order(fire) for fire in rows]
            # Keyed: a row may be so old that only the archive still knows its task.
            outcomes = await self._tasks.submit_many(orders, request_id="schedule", owner=owner, keyed=True)
            for fire, outcome in zip(rows, outcomes, strict=True):
                await self._settle(fire, outcome)

    async def _settle(self, fire: Document, outcome: Accepted | problems.Problem) -> None:
        if isinstance(outcome, Accepted):
            await self._fires.settle(fire, "published")
        elif isinstance(outcome, problems.KeyReused):
            log.error("the task of a fire is another one", task_id=fire["task_id"])
            await self._fires.settle(fire, "refused", outcome.detail)
        else:
            log.warning("a fire waits", task_id=fire["task_id"], reason=outcome.detail)
            await self._fires.postpone(fire, outcome.detail)


def _order(fire: Document) -> Order:
    payload = orjson.loads(fire["payload"])
    return Order(TaskName(fire["task"]), payload, fire["task_id"], body_digest(payload))
