"""The client, and the indexes of all collections."""

from typing import Any

from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import AsyncMongoClient, MongoClient

from app.database import (
    audit,
    fulfilments,
    items,
    jobs,
    letters,
    markers,
    orders,
    outbox,
    outside,
    results,
    schedules,
    workflows,
)
from app.database.documents import Document
from app.settings import Settings

INDEXES = {
    "audit": audit.INDEXES,
    "items": items.INDEXES,
    "dead_letters": letters.INDEXES,
    "event_markers": markers.INDEXES,
    "fulfilments": fulfilments.INDEXES,
    "orders": orders.INDEXES,
    "outbox": outbox.INDEXES,
    "task_results": results.INDEXES,
    "outside_effects": outside.EFFECT_INDEXES,
    "workflows": workflows.INDEXES,
    "jobs": jobs.INDEXES,
    "job_steps": jobs.STEP_INDEXES,
    "job_outputs": jobs.OUTPUT_INDEXES,
    "schedules": schedules.INDEXES,
    "schedule_fires": schedules.FIRE_INDEXES,
}


def create_client(settings: Settings, *, name: str) -> Any:
    """A client with bounded pools and timeouts; PyMongo's or Motor's, whose calls are the same. Connects lazily."""
    kind = AsyncIOMotorClient if settings.mongodb_driver == "motor" else AsyncMongoClient
    milliseconds = int(settings.mongodb_timeout * 1000)
    return kind(
        settings.mongodb_url.get_secret_value(),
        appname=name,
        tz_aware=True,
        minPoolSize=settings.mongodb_pool_min,
        maxPoolSize=settings.mongodb_pool_max,
        timeoutMS=milliseconds,
        serverSelectionTimeoutMS=milliseconds,
        connectTimeoutMS=milliseconds,
    )


def create_worker_client(settings: Settings, *, name: str) -> MongoClient[Document]:
    """A client without an event loop, for the processes that run tasks. Connects at the first call."""
    milliseconds = int(settings.mongodb_timeout * 1000)
    return MongoClient(
        settings.mongodb_url.get_secret_value(),
        appname=name,
        tz_aware=True,
        maxPoolSize=2,
        connect=False,
        timeoutMS=milliseconds,
        serverSelectionTimeoutMS=milliseconds,
        connectTimeoutMS=milliseconds,
    )


async def ensure_indexes(database: Any) -> None:
    """Create what `INDEXES` lists and is not there. Raises `pymongo.errors.PyMongoError`."""
    for collection, indexes in INDEXES.items():
        await database[collection].create_indexes(indexes)
