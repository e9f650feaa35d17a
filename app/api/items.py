"""Items: CRUD over MongoDB, with keyset pages, ETags and merge patches. Example to replace by your own."""

from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Body, Header, Query, Response

from app import problems
from app.api.dependencies import ContextDep, EdgeKeyDep, IdentityDep
from app.api.parsing import object_id, position, validated
from app.api.preconditions import entity_tag, expected_versions, not_modified
from app.contracts import nested_deeper
from app.engine.identity import body_digest
from app.models import METADATA_MAX_DEPTH, Item, ItemContent, ItemPage

router = APIRouter(prefix="/api/items", tags=["items"])

Responses = dict[int | str, dict[str, Any]]

NO_ITEM = "There is no item with this id."

IfMatch = Annotated[str | None, Header(description="Act only on this version (an ETag); else 412.")]
ABSENT: Responses = {404: problems.example(problems.NotFound)}
STALE: Responses = {412: problems.example(problems.PreconditionFailed)}


@router.get("")
async def list_items(
    context: ContextDep,
    response: Response,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the page before.")] = None,
    category: Annotated[str | None, Query(min_length=1, max_length=100)] = None,
) -> ItemPage:
    """A page of items in the order they were made; the next page costs the same, however far it is."""
    rows = await context.items.page(limit=limit + 1, after=position(cursor), category=category)
    page = [_item(row) for row in rows[:limit]]
    following = page[-1].id if len(rows) > limit else None
    if following:
        query = {"limit": limit, "cursor": following} | ({"category": category} if category else {})
        response.headers["Link"] = f'</api/items?{urlencode(query)}>; rel="next"'
    return ItemPage(items=page, next_cursor=following)


@router.post("", status_code=201, responses={409: problems.example(problems.Conflict)})
async def create_item(content: ItemContent, context: ContextDep, identity: IdentityDep, response: Response) -> Item:
    """Make an item."""
    fields = content.model_dump()
    digest = body_digest(fields)
    row, new = await context.items.create(fields, identity=identity.id, digest=digest)
    if row["digest"] != digest:
        raise problems.KeyReused
    response.headers["Location"] = f"/api/items/{row['_id']}"
    response.headers["ETag"] = entity_tag(row["version"])
    response.headers.update(identity.replay_headers(replayed=not new))
    return _item(row)


@router.get("/{item_id}", response_model=Item, responses={304: {"description": "Not modified"}, **ABSENT})
async def get_item(
    item_id: str,
    context: ContextDep,
    response: Response,
    if_none_match: Annotated[str | None, Header(description="Answer 304 if this is the present ETag.")] = None,
) -> Item | Response:
    """One item."""
    row = await context.items.get(object_id(item_id, NO_ITEM))
    if row is None:
        raise problems.NotFound(NO_ITEM)
    tag = entity_tag(row["version"])
    if not_modified(if_none_match, row["version"]):
        return Response(status_code=304, headers={"ETag": tag})
    response.headers["ETag"] = tag
    return _item(row)


@router.put("/{item_id}", responses={409: problems.example(problems.Conflict), **ABSENT, **STALE})
async def replace_item(
    item_id: str,
    content: ItemContent,
    context: ContextDep,
    edge_key: EdgeKeyDep,
    response: Response,
    if_match: IfMatch = None,
) -> Item:
    """Replace an item's content; fields that are not given get their defaults."""
    fields = content.model_dump()
    row = await context.items.change(
        object_id(item_id, NO_ITEM), lambda _: fields, versions=expected_versions(if_match), edge=edge_key
    )
    return _changed(row, response)


@router.patch("/{item_id}", responses={409: problems.example(problems.Conflict), **ABSENT, **STALE})
async def patch_item(
    item_id: str,
    patch: Annotated[dict[str, Any], Body(media_type="application/merge-patch+json")],
    context: ContextDep,
    edge_key: EdgeKeyDep,
    response: Response,
    if_match: IfMatch = None,
) -> Item:
    """Change some fields by a JSON merge patch (RFC 7396): null resets a field, objects are merged."""
    if nested_deeper(patch, METADATA_MAX_DEPTH + 1):
        raise problems.Invalid(f"The patch is nested deeper than {METADATA_MAX_DEPTH + 1} levels.")

    def merged(row: dict[str, Any]) -> dict[str, Any]:
        return validated(
            ItemContent, merge_patch({name: row[name] for name in ItemContent.model_fields if name in row}, patch)
        ).model_dump()

    row = await context.items.change(
        object_id(item_id, NO_ITEM), merged, versions=expected_versions(if_match), edge=edge_key
    )
    return _changed(row, response)


@router.delete(
    "/{item_id}",
    status_code=204,
    response_class=Response,
    responses={409: problems.example(problems.Conflict), **ABSENT, **STALE},
)
async def delete_item(item_id: str, context: ContextDep, edge_key: EdgeKeyDep, if_match: IfMatch = None) -> None:
    """Delete an item."""
    if not await context.items.delete(object_id(item_id, NO_ITEM), versions=expected_versions(if_match), edge=edge_key):
        raise problems.NotFound(NO_ITEM)


def merge_patch(target: Any, patch: Any) -> Any:
    """`target` changed by `patch` as RFC 7396, section 2, has it; neither is modified."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged


def _changed(row: dict[str, Any] | None, response: Response) -> Item:
    if row is None:
        raise problems.NotFound(NO_ITEM)
    response.headers["ETag"] = entity_tag(row["version"])
    return _item(row)


def _item(row: dict[str, Any]) -> Item:
    return Item(id=str(row["_id"]), **{name: row[name] for name in Item.model_fields if name in row})
