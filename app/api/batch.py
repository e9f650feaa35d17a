"""Many tasks by one request: each row is validated, submitted and answered for itself."""

from typing import Annotated, Any, Literal, Union

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, create_model

from app import problems
from app.api.errors import told
from app.api.processing import offer
from app.api.submit import SubmitDep, Work
from app.models import BatchAccepted, Body, RowProblem, TaskAccepted

router = APIRouter(
    prefix="/api/async",
    tags=["tasks"],
    responses={409: problems.example(problems.InFlight), 503: problems.example(problems.NotPublished)},
)

ROWS_MAX = 1000
DEFAULT = next(iter(offer.kinds))


def _schema(name: str, request: type[BaseModel]) -> type[BaseModel]:
    """The request's schema with the name of its kind, which the default one may leave out."""
    task: Any = (Literal[name], name if name == DEFAULT else ...)
    return create_model("".join(word.title() for word in name.split("-")) + "Row", __base__=request, task=task)


SCHEMAS = {name: _schema(name, kind.request) for name, kind in offer.kinds.items()}
AnyRow: Any = Union[tuple(SCHEMAS.values())]  # noqa: UP007  made when imported


def _row(row: Any, _all: ValidatorFunctionWrapHandler) -> BaseModel | problems.Problem:
    """One row by the schema of its kind, or what is wrong with it: the others go on."""
    name = row.get("task", DEFAULT) if isinstance(row, dict) else DEFAULT
    if not isinstance(name, str) or name not in SCHEMAS:
        message = f"Input should be one of: {', '.join(SCHEMAS)}"
        return problems.Invalid(errors=[{"loc": ["task"], "msg": message, "type": "unknown_task"}])
    try:
        return SCHEMAS[name].model_validate(row)
    except ValidationError as error:
        return problems.Invalid(
            errors=told(error.errors(include_url=False, include_context=False, include_input=False))
        )


class Batch(Body):
    """Tasks to submit; each row is the body of a single submit and `task`, which names it."""

    tasks: list[Annotated[AnyRow, WrapValidator(_row)]] = Field(min_length=1, max_length=ROWS_MAX)


@router.post("/batch", status_code=202, response_model_exclude_none=True)
async def submit_batch(body: Batch, submit: SubmitDep, response: Response) -> BatchAccepted:
    """Hand over up to 1,000 tasks at once; a row that is refused keeps back no other.

    A repeat with the same Idempotency-Key makes no second task of a row, and takes those that were refused. Where no
    row is accepted the answer is a problem: 503 or 409 where a repeat may help, else 422; unless it is the same for
    all rows, its `errors` has each row's.
    """
    results: dict[int, TaskAccepted | problems.Problem] = {}
    rows: dict[int, tuple[Work, BaseModel]] = {}
    for number, row in enumerate(body.tasks):
        if isinstance(row, problems.Problem):
            results[number] = row
        else:
            rows[number] = offer.kinds[row.task].work(row), row
    results |= await submit.many(rows)
    found = [results[number] for number in range(len(body.tasks))]
    refused = [result for result in found if isinstance(result, problems.Problem)]
    if len(refused) == len(found):
        raise _all_refused(refused)
    again = max((result.retry_after or 1 for result in refused), default=1)
    response.headers["Retry-After"] = str(problems.jittered(again))
    return BatchAccepted(
        accepted=len(found) - len(refused),
        refused=len(refused),
        results=[
            RowProblem(**problems.document(result)) if isinstance(result, problems.Problem) else result
            for result in found
        ],
    )


def _all_refused(refused: list[problems.Problem]) -> problems.Problem:
    """The answer to a batch of which nothing was taken: what may pass comes first, since a repeat then makes sense."""
    answer = next((problem for problem in refused if problem.retry_after is not None), refused[0])
    if len({problem.slug for problem in refused}) == 1 and not isinstance(answer, problems.Invalid):
        return answer
    kind = problems.Invalid if answer.retry_after is None else type(answer)
    return kind("No row was accepted.", errors=[problems.document(problem) for problem in refused])
