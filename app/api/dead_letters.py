"""What failed for good: look at it, run it again, or let it be. For operators."""

from typing import Annotated, Any, Literal
from urllib.parse import urlencode

import orjson
from fastapi import APIRouter, Query, Response

from app import problems
from app.api.dependencies import AdminDep, ContextDep
from app.api.parsing import object_id, position
from app.models import DeadLetter, DeadLetterPage, Replayed

router = APIRouter(
    prefix="/api/dead-letters", tags=["dead letters"], responses={404: problems.example(problems.NotFound)}
)

NO_LETTER = "There is no dead letter with this id."


@router.get("")
async def list_letters(  # one parameter a filter
    context: ContextDep,
    _admin: AdminDep,
    response: Response,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the page before.")] = None,
    state: Annotated[Literal["open", "replayed", "discarded"] | None, Query()] = "open",
    task: Annotated[str | None, Query(max_length=200, description="Name of the task, or type of the event.")] = None,
    queue: Annotated[str | None, Query(max_length=200)] = None,
) -> DeadLetterPage:
    """A page of dead letters, the latest first."""
    rows = await context.letters.page(limit=limit + 1, before=position(cursor), state=state, name=task, queue=queue)
    page = [_shown(row) for row in rows[:limit]]
    following = page[-1].id if len(rows) > limit else None
    if following:
        filters = {"state": state, "task": task, "queue": queue}
        query = {"limit": limit, "cursor": following} | {name: value for name, value in filters.items() if value}
        response.headers["Link"] = f'</api/dead-letters?{urlencode(query)}>; rel="next"'
    return DeadLetterPage(dead_letters=page, next_cursor=following)


@router.get("/{letter_id}")
async def get_letter(letter_id: str, context: ContextDep, _admin: AdminDep) -> DeadLetter:
    """One dead letter, with its message."""
    return _shown(await _existing(context, letter_id))


@router.post(
    "/{letter_id}/replay",
    status_code=202,
    responses={409: problems.example(problems.Conflict), 503: problems.example(problems.NotPublished)},
)
async def replay(letter_id: str, context: ContextDep, admin: AdminDep, response: Response) -> Replayed:
    """Run the task, or handle the event, again under its own id. Once: what is settled already is a conflict."""
    row = await _existing(context, letter_id)
    if not await context.replay(row, by=admin.id):
        raise problems.Conflict("It was replayed or discarded already.")
    if row["task_id"] is None:
        return Replayed(id=letter_id, event_id=row["event_id"])
    status_url = f"/api/async/status/{row['task_id']}"
    response.headers["Location"] = status_url
    return Replayed(id=letter_id, task_id=row["task_id"], status_url=status_url)


@router.delete(
    "/{letter_id}", status_code=204, response_class=Response, responses={409: problems.example(problems.Conflict)}
)
async def discard(letter_id: str, context: ContextDep, admin: AdminDep) -> None:
    """Let it be: the task stays failed, the letter is kept until it expires, out of sight."""
    row = await _existing(context, letter_id)
    if not await context.letters.settle(row["_id"], "discarded", by=admin.id):
        raise problems.Conflict("It was replayed or discarded already.")


async def _existing(context: ContextDep, letter_id: str) -> dict[str, Any]:
    row = await context.letters.get(object_id(letter_id, NO_LETTER))
    if row is None:
        raise problems.NotFound(NO_LETTER)
    return row


def _shown(row: dict[str, Any]) -> DeadLetter:
    message = dict(row["message"])
    if "payload" in message:
        message["payload"] = orjson.loads(message["payload"])
    if "event" in message:
        message["event"] = orjson.loads(message["event"])
    return DeadLetter.model_validate({**row, "id": str(row["_id"]), "message": message})
