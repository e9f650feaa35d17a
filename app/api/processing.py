"""What clients may have done: each function says which task a request's body means.

Each is a route, and a kind of row in a batch (app/api/batch.py), of which the first one here is the default.
"""

from fastapi import APIRouter

from app import problems
from app.api.submit import Offers, Work
from app.contracts import HEAVY_QUEUES, CountWords, ProcessData, TaskName
from app.models import CountWordsRequest, ProcessRequest

router = APIRouter(
    prefix="/api/async",
    tags=["tasks"],
    responses={409: problems.example(problems.InFlight), 503: problems.example(problems.NotPublished)},
)
offer = Offers(router)


@offer("process")
def process(body: ProcessRequest) -> Work:
    """Hand heavy work to the workers; poll `status_url` for its progress and result."""
    payload = ProcessData(data=body.data, iterations=body.iterations)
    return Work(TaskName.PROCESS_DATA, payload, HEAVY_QUEUES[body.priority])


@offer("count-words")
def count_words(body: CountWordsRequest) -> Work:
    """Hand light work to the workers."""
    return Work(TaskName.COUNT_WORDS, CountWords(text=body.text))
