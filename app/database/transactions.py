"""Transactions, alike for PyMongo's asynchronous client and Motor."""

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pymongo
from pymongo.errors import PyMongoError

ATTEMPTS = 8
PAUSE = 0.005  # seconds, doubled with each attempt, at most: who lost a race must not run the next one at once
TRANSIENT, UNKNOWN = "TransientTransactionError", "UnknownTransactionCommitResult"

Result = TypeVar("Result")


async def in_transaction(database: Any, work: Callable[[Any], Awaitable[Result]], *, seconds: float) -> Result:
    """Do `work`, which passes the session it is given to all its operations, and commit it; answers what it answers.

    What `work` raises undoes it. It may be called more than once, as MongoDB asks for another attempt; all of them
    together, and each operation, end after `seconds`. Not the drivers' `with_transaction`, which has bounds of its own
    (120 s) and other ones in each driver. Raises `pymongo.errors.PyMongoError` when MongoDB cannot serve.
    """
    started = database.client.start_session()
    with pymongo.timeout(seconds):
        async with await started if inspect.isawaitable(started) else started as session:
            for attempt in range(1, ATTEMPTS):
                try:
                    return await _once(session, work)
                except PyMongoError as error:
                    if not error.has_error_label(TRANSIENT):
                        raise
                await asyncio.sleep(random.uniform(0, PAUSE * 2**attempt))  # noqa: S311  not for secrets
            return await _once(session, work)


async def _once(session: Any, work: Callable[[Any], Awaitable[Result]]) -> Result:
    started = session.start_transaction()
    if inspect.iscoroutine(started):
        await started
    try:
        result = await work(session)
    except BaseException:
        if session.in_transaction:
            await session.abort_transaction()
        raise
    await _commit(session)
    return result


async def _commit(session: Any) -> None:
    for _ in range(ATTEMPTS):
        try:
            await session.commit_transaction()
        except PyMongoError as error:
            # A commit may be repeated: MongoDB knows whether it has been done.
            if not error.has_error_label(UNKNOWN) or error.timeout:
                raise
        else:
            return
    await session.commit_transaction()
