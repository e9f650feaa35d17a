"""Submitting work: each route validates, submits and answers 202."""

from fastapi import APIRouter

from app import problems
from app.api.submit import SubmitDep
from app.contracts import HEAVY_QUEUES, CountWords, ProcessData, TaskName
from app.models import CountWordsRequest, ProcessRequest, TaskAccepted

router = APIRouter(
    prefix="/api/async",
    tags=["tasks"],
    responses={409: problems.example(problems.InFlight), 503: problems.example(problems.NotPublished)},
)


@router.post("/process", status_code=202)
async def process(body: ProcessRequest, submit: SubmitDep) -> TaskAccepted:
    """Hand heavy work to the workers; poll `status_url` for its progress and result."""
    payload = ProcessData(data=body.data, iterations=body.iterations)
    return await submit(TaskName.PROCESS_DATA, payload, body, HEAVY_QUEUES[body.priority])


@router.post("/count-words", status_code=202)
async def count_words(body: CountWordsRequest, submit: SubmitDep) -> TaskAccepted:
    """Hand light work to the workers."""
    return await submit(TaskName.COUNT_WORDS, CountWords(text=body.text), body)
