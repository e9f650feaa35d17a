"""Schedules: tasks that beat fires by interval or crontab. For operators."""

from datetime import datetime
from typing import Annotated, Any
from urllib.parse import urlencode

import orjson
from fastapi import APIRouter, Body, Header, Query, Response

from app import problems
from app.api.dependencies import AdminDep, ContextDep, EdgeKeyDep, IdentityDep
from app.api.items import merge_patch
from app.api.parsing import object_id, position, validated
from app.api.preconditions import entity_tag, expected_versions
from app.contracts import nested_deeper
from app.database.documents import present
from app.engine.identity import body_digest
from app.engine.schedules import timing_of
from app.models import METADATA_MAX_DEPTH, Fire, Schedule, ScheduleContent, SchedulePage, ScheduleShown

router = APIRouter(prefix="/api/schedules", tags=["schedules"])

NO_SCHEDULE = "There is no schedule with this id."
FIRES_SHOWN = 10
TIMING = ("interval", "crontab", "timezone", "enabled")  # what begins anew when it is changed

IfMatch = Annotated[str | None, Header(description="Act only on this version (an ETag); else 412.")]
Responses = dict[int | str, dict[str, Any]]
ABSENT: Responses = {404: problems.example(problems.NotFound)}
CHANGED: Responses = {
    **ABSENT,
    409: problems.example(problems.Conflict),
    412: problems.example(problems.PreconditionFailed),
}


@router.get("")
async def list_schedules(
    context: ContextDep,
    _admin: AdminDep,
    response: Response,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the page before.")] = None,
) -> SchedulePage:
    """A page of schedules in the order they were made."""
    rows = await context.schedules.page(limit=limit + 1, after=position(cursor))
    page = [_schedule(row) for row in rows[:limit]]
    following = page[-1].id if len(rows) > limit else None
    if following:
        query = urlencode({"limit": limit, "cursor": following})
        response.headers["Link"] = f'</api/schedules?{query}>; rel="next"'
    return SchedulePage(schedules=page, next_cursor=following)


@router.post("", status_code=201)
async def create_schedule(
    content: ScheduleContent, context: ContextDep, admin: AdminDep, identity: IdentityDep, response: Response
) -> Schedule:
    """Make a schedule; its tasks belong to the key that made it."""
    digest = body_digest(content.model_dump(mode="json"))
    fields = {**_fields(content), **_anew(content, present()), "owner": admin.id}
    row, new = await context.schedules.create(fields, identity=identity.id, digest=digest)
    if row["digest"] != digest:
        raise problems.KeyReused
    response.headers["Location"] = f"/api/schedules/{row['_id']}"
    response.headers["ETag"] = entity_tag(row["version"])
    response.headers.update(identity.replay_headers(replayed=not new))
    return _schedule(row)


@router.get("/{schedule_id}", responses=ABSENT)
async def get_schedule(schedule_id: str, context: ContextDep, _admin: AdminDep, response: Response) -> ScheduleShown:
    """One schedule, with its latest fires."""
    row = await context.schedules.get(object_id(schedule_id, NO_SCHEDULE))
    if row is None:
        raise problems.NotFound(NO_SCHEDULE)
    fires = await context.fires.latest(row["_id"], FIRES_SHOWN)
    response.headers["ETag"] = entity_tag(row["version"])
    shown = [Fire.model_validate(fire) for fire in fires]
    return ScheduleShown(**dict(_schedule(row)), fires=shown)


@router.put("/{schedule_id}", responses=CHANGED)
async def replace_schedule(
    schedule_id: str,
    content: ScheduleContent,
    context: ContextDep,
    _admin: AdminDep,
    edge_key: EdgeKeyDep,
    response: Response,
    if_match: IfMatch = None,
) -> Schedule:
    """Replace what a schedule says; fields that are not given get their defaults."""
    row = await context.schedules.change(
        object_id(schedule_id, NO_SCHEDULE),
        lambda row: _change(row, content),
        versions=expected_versions(if_match),
        edge=edge_key,
    )
    return _changed(row, response)


@router.patch("/{schedule_id}", responses=CHANGED)
async def patch_schedule(
    schedule_id: str,
    patch: Annotated[dict[str, Any], Body(media_type="application/merge-patch+json")],
    context: ContextDep,
    _admin: AdminDep,
    edge_key: EdgeKeyDep,
    response: Response,
    if_match: IfMatch = None,
) -> Schedule:
    """Change some fields by a JSON merge patch (RFC 7396); `{"enabled": false}` pauses it."""
    if nested_deeper(patch, METADATA_MAX_DEPTH + 1):
        raise problems.Invalid(f"The patch is nested deeper than {METADATA_MAX_DEPTH + 1} levels.")
    row = await context.schedules.change(
        object_id(schedule_id, NO_SCHEDULE),
        lambda row: _change(row, validated(ScheduleContent, merge_patch(_content(row), patch))),
        versions=expected_versions(if_match),
        edge=edge_key,
    )
    return _changed(row, response)


@router.delete("/{schedule_id}", status_code=204, response_class=Response, responses=CHANGED)
async def delete_schedule(
    schedule_id: str, context: ContextDep, _admin: AdminDep, edge_key: EdgeKeyDep, if_match: IfMatch = None
) -> None:
    """Delete a schedule; fires that were due before are still made."""
    known = object_id(schedule_id, NO_SCHEDULE)
    if not await context.schedules.delete(known, versions=expected_versions(if_match), edge=edge_key):
        raise problems.NotFound(NO_SCHEDULE)


def _fields(content: ScheduleContent) -> dict[str, Any]:
    # As text: BSON cannot say all that JSON can.
    return {**content.model_dump(mode="json"), "payload": orjson.dumps(content.payload).decode()}


def _anew(content: ScheduleContent, now: datetime) -> dict[str, Any]:
    """From when on a schedule counts, and when it fires first."""
    timing = timing_of({**content.model_dump(), "anchor": now})
    return {"anchor": now, "next_run": timing.after(now) if content.enabled else None}


def _change(row: dict[str, Any], content: ScheduleContent) -> dict[str, Any]:
    fields = _fields(content)
    # A fire that is due just now is not lost to a change that has nothing to do with it.
    same = all(row[name] == fields[name] for name in TIMING)
    return fields if same else {**fields, **_anew(content, present())}


def _content(row: dict[str, Any]) -> dict[str, Any]:
    return {**{name: row[name] for name in ScheduleContent.model_fields}, "payload": orjson.loads(row["payload"])}


def _changed(row: dict[str, Any] | None, response: Response) -> Schedule:
    if row is None:
        raise problems.NotFound(NO_SCHEDULE)
    response.headers["ETag"] = entity_tag(row["version"])
    return _schedule(row)


def _schedule(row: dict[str, Any]) -> Schedule:
    return Schedule.model_validate({**row, "id": str(row["_id"]), "payload": orjson.loads(row["payload"])})
