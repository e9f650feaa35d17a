"""Workflows: started, looked at, stopped. One POST a definition."""

import json
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Response

from app import problems
from app.api.dependencies import ContextDep, IdentityDep, PrincipalDep, RequestIdDep
from app.api.parsing import uuid
from app.contracts import Payload
from app.engine.identity import body_digest
from app.engine.plan import ENDED
from app.engine.record import moment, progress_of
from app.engine.workflows import Definition
from app.models import WorkflowAccepted, WorkflowCancelled, WorkflowStatus

PREFIX = "/api/workflows"
NO_WORKFLOW = "There is no workflow with this id."
Responses = dict[int | str, dict[str, Any]]


def create_router(definitions: Mapping[str, Definition]) -> APIRouter:
    """The routes for workflows of `definitions`, by kind."""
    router = APIRouter(prefix=PREFIX, tags=["workflows"])
    for definition in definitions.values():
        _offer(router, definition)
    missing: Responses = {404: problems.example(problems.NotFound)}
    router.get("/{workflow_id}", response_model=WorkflowStatus, responses=missing)(get_workflow)
    conflict: Responses = {409: problems.example(problems.Conflict)}
    router.delete("/{workflow_id}", status_code=202, responses={**missing, **conflict})(cancel)
    return router


def _offer(router: APIRouter, definition: Definition) -> None:
    async def start(
        body: Payload,
        context: ContextDep,
        identity: IdentityDep,
        principal: PrincipalDep,
        request_id: RequestIdDep,
        response: Response,
    ) -> WorkflowAccepted:
        status, replayed = await context.workflows.start(
            definition.kind,
            body,
            workflow_id=identity.id,
            digest=body_digest(body.model_dump(mode="json")),
            request_id=request_id,
            owner=principal.id,
        )
        url = f"{PREFIX}/{identity.id}"
        response.headers.update(
            {
                "Location": url,
                "Retry-After": str(problems.jittered(1)),
                **identity.replay_headers(replayed=replayed),
            }
        )
        return WorkflowAccepted(workflow_id=identity.id, status=status, status_url=url)

    start.__annotations__["body"] = definition.request
    start.__name__ = f"start_{definition.kind}"
    start.__doc__ = definition.request.__doc__
    full: Responses = {503: problems.example(problems.WorkflowsFull)}
    router.post(f"/{definition.kind}", status_code=202, responses=full)(start)


async def get_workflow(workflow_id: str, context: ContextDep, principal: PrincipalDep) -> Response:
    """A workflow with each member's state; `Retry-After` says when to ask again while it has not ended."""
    found = await context.workflows.find(uuid(workflow_id, NO_WORKFLOW), principal)
    headers = {"Cache-Control": "no-store"}
    if found["status"] not in ENDED:
        headers["Retry-After"] = str(problems.jittered(1))
    # With a thousand members FastAPI's own way from the model to the answer would hold the loop for long.
    shown = _shown(found, await context.workflows.glimpse(found)).model_dump_json()
    return Response(shown, headers=headers, media_type="application/json")


async def cancel(workflow_id: str, context: ContextDep, principal: PrincipalDep) -> WorkflowCancelled:
    """Stop a workflow: what waits never starts, what runs stops at its next report, what was done is taken back."""
    known = uuid(workflow_id, NO_WORKFLOW)
    status = await context.workflows.cancel(known, principal)
    return WorkflowCancelled(workflow_id=known, status=status, status_url=f"{PREFIX}/{known}")


def _shown(found: Mapping[str, Any], live: Mapping[str, Mapping[str, str]]) -> WorkflowStatus:
    members = {name: _task(one, live.get(one["task_id"], {})) for name, one in found["members"].items()}
    undos = {name: _task(one, live.get(one["task_id"], {})) for name, one in found["compensations"].items()}
    return WorkflowStatus.model_validate(
        {
            **found,
            "result": _parsed(found["result"]),
            "members": members,
            "compensations": undos,
            "progress": _overall(members),
        }
    )


def _task(one: Mapping[str, Any], record: Mapping[str, str]) -> dict[str, Any]:
    status = one["status"]
    if status == "PENDING" and "status" in record:
        status = record["status"]
    return {
        **one,
        "status": status,
        "attempts": one["attempts"] or int(record.get("attempts", 0)),
        "started_at": one["started_at"] or moment(record.get("started_at")),
        "result": _parsed(one["result"]),
        "progress": progress_of(record),
    }


def _overall(members: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    done = sum(one["status"] == "SUCCESS" for one in members.values())
    parts = sum((one["progress"] or {}).get("progress", 0) for one in members.values() if one["status"] == "PROGRESS")
    return {"current": done, "total": len(members), "progress": round((100 * done + parts) / len(members), 1)}


def _parsed(text: str | None) -> Any:
    return None if text is None else json.loads(text)
