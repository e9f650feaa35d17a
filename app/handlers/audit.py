"""The service `audit`: a row in MongoDB for each event it hears of. Example to replace by your own."""

from typing import Any

from app.database import AuditRepository
from app.engine.envelope import Event
from app.engine.events import Handlers

on = Handlers()


@on("#")
async def note(event: Event, session: Any, database: Any) -> None:
    """Keep what happened; of an event that comes twice, once."""
    await AuditRepository(database).add(event.document(), session=session)
