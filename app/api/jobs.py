"""Jobs: work of several steps, each of which is told when it begins and ends. Served at /jobs and /api/jobs."""

import json
import re
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response

from app import problems
from app.api.dependencies import ContextDep, IdentityDep, PrincipalDep, RequestIdDep
from app.api.parsing import uuid
from app.contracts import RunJob
from app.engine.identity import body_digest
from app.engine.jobs import NO_JOB, job_of
from app.models import Job, JobAccepted, JobRequest, JobState, JobSummary

router = APIRouter(tags=["jobs"])

CURSOR = re.compile(r"[0-9T:.+-]{29}-[0-9a-f-]{36}")


@router.post(
    "/jobs",
    status_code=202,
    responses={409: problems.example(problems.InFlight), 503: problems.example(problems.NotPublished)},
)
async def create_job(
    body: JobRequest,
    request: Request,
    context: ContextDep,
    identity: IdentityDep,
    principal: PrincipalDep,
    request_id: RequestIdDep,
    response: Response,
) -> JobAccepted:
    """Hand over a job; `Location` tells what becomes of it."""
    accepted = await context.jobs.submit(
        RunJob(name=body.name, payload=body.payload, rehearsal=body.rehearsal),
        task_id=identity.id,
        digest=body_digest(body.model_dump(mode="json")),
        request_id=request_id,
        owner=principal.id,
        keyed=identity.from_client,
    )
    job_id = job_of(accepted.task_id)
    response.headers["Location"] = f"{request.url.path}/{job_id}"
    response.headers["Retry-After"] = str(problems.jittered(1))
    response.headers.update(identity.replay_headers(replayed=accepted.replayed))
    return JobAccepted(job_id=job_id, task_id=accepted.task_id)


@router.get("/jobs")
async def list_jobs(
    request: Request,
    context: ContextDep,
    principal: PrincipalDep,
    response: Response,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: Annotated[str | None, Query(description="As `Link: rel=next` of the page before has it.")] = None,
    status: JobState | None = None,
) -> list[JobSummary]:
    """A page of the jobs of who asks, the latest first; of all jobs for who has a key of admin scope."""
    if cursor is not None and not CURSOR.fullmatch(cursor):
        raise problems.Invalid("The cursor is not one that this API gave.")
    rows = await context.jobs.page(principal, limit=limit + 1, before=cursor, status=status)
    if len(rows) > limit:
        query = {"limit": limit, "cursor": rows[limit - 1]["_id"]} | ({"status": status} if status else {})
        response.headers["Link"] = f'<{request.url.path}?{urlencode(query)}>; rel="next"'
    return [JobSummary.model_validate(row) for row in rows[:limit]]


@router.get("/jobs/{job_id}", responses={404: problems.example(problems.NotFound)})
async def get_job(job_id: str, context: ContextDep, principal: PrincipalDep, response: Response) -> Job:
    """One job with its steps."""
    row = await context.jobs.get(uuid(job_id, NO_JOB), principal)
    response.headers["Cache-Control"] = "no-store"
    if row["status"] in ("PENDING", "IN_PROGRESS"):
        response.headers["Retry-After"] = str(problems.jittered(1))
    return Job.model_validate({**row, "result": _result(row["result"])})


def _result(text: str | None) -> Any:
    return None if text is None else json.loads(text)
