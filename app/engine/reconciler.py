"""The reconciler: publishes again the tasks whose message got lost.

Every task that has not ended stands in the sorted set `tasks:open`, scored by when it is to be looked at. What is found
suspect then is published once more, under a publish id of its own, which makes a second message harmless should the
first one live after all (app/engine/lua/start.lua). Each look doubles the time until the next.
"""

import asyncio
from collections.abc import Mapping

import structlog
from pymongo.errors import PyMongoError
from redis.exceptions import RedisError

from app.contracts import Queue
from app.database import TaskResultRepository
from app.engine.loops import forever
from app.engine.message import Message
from app.engine.publisher import Publisher, Refused, Unconfirmed
from app.engine.record import FINAL, Status
from app.engine.state import AsyncTaskStore
from app.settings import Settings

log = structlog.get_logger(__name__)

LOOK_MAX = 3600.0  # seconds between two looks at most


class Reconciler:
    """Looks at open tasks, at most RECONCILE_BATCH a round. Any number may run: each look is taken by one of them."""

    def __init__(
        self,
        store: AsyncTaskStore,
        publisher: Publisher,
        results: TaskResultRepository,
        settings: Settings,
        *,
        lease: float,
    ) -> None:
        self._store = store
        self._results = results
        self._publisher = publisher
        self._lease = lease
        self._look_after = settings.reconcile_after
        self._interval = settings.reconcile_interval
        self._recovery_time = settings.recovery_time
        self._batch = settings.reconcile_batch

    async def run(self) -> None:
        """Reconcile until cancelled; with a server away nothing is touched."""
        await forever(self._round_and_rest, "reconciler", (RedisError, PyMongoError, Refused))

    async def _round_and_rest(self) -> None:
        looked = await self.round()
        # A full batch: more are due.
        await asyncio.sleep(0.1 if looked == self._batch else self._interval)

    async def round(self) -> int:
        """Look at what is due; answers how many that were.

        Raises `RedisError`, `Refused` without a broker, and `PyMongoError`.
        """
        recovering = await self._store.recovering()
        ids = await self._store.due(self._batch)
        if not ids and not recovering:
            return 0
        depths = await self._publisher.depths(Queue)
        if recovering and not any(depths.values()):
            # Not seen here: messages that workers hold, and retries. Where no task has ever ended there are none.
            await self._store.recovered(0 if await self._results.empty() else self._recovery_time)
        later: list[tuple[str, float]] = []
        for task_id, seen in zip(ids, await self._store.glances(ids), strict=True):
            looks = int(seen.get("looks", 0))
            if seen and seen["status"] not in FINAL and _suspect(seen, depths):
                await self._publish_again(task_id, looks)
            else:
                later.append((task_id, self._again_in(looks)))
        await self._store.postpone(later)
        return len(ids)

    async def _publish_again(self, task_id: str, looks: int) -> None:
        record = await self._store.record(task_id)
        try:
            message = Message.of_record(task_id, record)
        except (KeyError, ValueError):
            log.exception("a record cannot be read, its task is left alone", task_id=task_id)
            await self._store.postpone([(task_id, LOOK_MAX)])
            return
        taken = await self._store.retake(message, lease=self._lease, again_in=self._again_in(looks + 1))
        if not taken:
            return
        log.warning("task published again", task_id=task_id, task=message.name, status=record["status"], looks=looks)
        try:
            await self._publisher.publish(message)
        except (Refused, Unconfirmed) as error:
            # It stays as it is, and is looked at again.
            log.warning("task not published", task_id=task_id, reason=str(error))
        else:
            await self._store.confirm(message)

    def _again_in(self, looks: int) -> float:
        return min(self._look_after * 2.0 ** min(looks, 20), LOOK_MAX)


def _suspect(seen: Mapping[str, str], depths: Mapping[str, int]) -> bool:
    """Whether the message of a task that is due for a look seems to be lost."""
    if "lost" in seen:  # its message came to the dead letters, or its worker ended its run
        return True
    if seen["status"] in (Status.STARTED, Status.PROGRESS):
        return True  # due only once the run must have ended
    if "lease" in seen:
        return True  # due only once the lease is over
    # What waits in line waits rightly; with nobody in line its message is gone, or held back by a worker that is busy.
    return depths.get(seen["queue"], 0) == 0
