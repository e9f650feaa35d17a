"""Mail: `send`, and `recall` what was sent under the same key, by a second mail or before it leaves."""

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field

from app import problems
from app.backends.outside.world import Body, Effect, KeyDep, KeyPath, WorldDep
from app.contracts import EMAIL

router = APIRouter(prefix="/mail", tags=["mail"])


class Mail(Body):
    """A mail."""

    to: Annotated[str, Field(pattern=EMAIL, max_length=254)]
    subject: Annotated[str, Field(max_length=200)]
    text: Annotated[str, Field(max_length=10_000)]


@router.post("/send", status_code=204)
async def send(mail: Mail, key: KeyDep, world: WorldDep) -> None:
    """Send a mail."""
    await world.effects.do("mail", key, mail.model_dump())


@router.post("/recall")
async def recall(key: KeyDep, world: WorldDep) -> Effect:
    """Tell who got the mail that it no longer holds; one that was not sent yet never is."""
    return Effect.model_validate(await world.effects.undo("mail", key))


@router.get("/mails/{key}")
async def get_mail(key: KeyPath, world: WorldDep) -> Effect:
    """What was sent under a key."""
    row = await world.effects.get("mail", key)
    if row is None:
        raise problems.NotFound
    return Effect.model_validate(row)
