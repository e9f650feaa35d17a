"""Transactions, alike for PyMongo's asynchronous client and Motor."""

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pymongo
from pymongo.errors import PyMongoError

COMMITS = 3
PAUSE, PAUSE_MAX = 0.005, 0.5  # seconds, doubled with each attempt: who lost a race must not run the next one at once
ABORT_TIME = 2.0  # seconds
TRANSIENT, UNKNOWN = "TransientTransactionError", "UnknownTransactionCommitResult"

Result = TypeVar("Result")


async def in_transaction(database: Any, work: Callable[[Any], Awaitable[Result]], *, seconds: float) -> Result:
    """Do `work`, which passes the session it is given to all its operations, and commit it; answers what it answers.

    What `work` raises undoes it. It may be called more than once, as MongoDB asks for another attempt; all of them
    together, and each operation, end after `seconds`, and `ABORT_TIME` more where one has to be taken back. Not the
    drivers' `with_transaction`, which has bounds of its own (120 s) and other ones in each driver. Raises
    `pymongo.errors.PyMongoError` when MongoDB cannot serve.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + seconds
    started = database.client.start_session()
    async with await started if inspect.isawaitable(started) else started as session:
        attempt = 1
        while True:
            try:
                return await _once(session, work, max(deadline - clock(), 0.001))
            except PyMongoError as error:
                pause = random.uniform(0, min(PAUSE_MAX, PAUSE * 2**attempt))  # noqa: S311  not for secrets
                if not error.has_error_label(TRANSIENT) or clock() + pause > deadline:
                    raise
            attempt += 1
            await asyncio.sleep(pause)


async def _once(session: Any, work: Callable[[Any], Awaitable[Result]], seconds: float) -> Result:
    try:
        with pymongo.timeout(seconds):
            started = session.start_transaction()
            if inspect.iscoroutine(started):
                await started
            result = await work(session)
            await _commit(session)
    except BaseException:
        # Outside of the time that may be over: left open, it would be in the way of the next one for a while.
        if session.in_transaction:
            with pymongo.timeout(ABORT_TIME):
                await session.abort_transaction()
        raise
    return result


async def _commit(session: Any) -> None:
    for _ in range(COMMITS):
        try:
            await session.commit_transaction()
        except PyMongoError as error:
            # A commit may be repeated: MongoDB knows whether it has been done.
            if not error.has_error_label(UNKNOWN) or error.timeout:
                raise
        else:
            return
    await session.commit_transaction()
