"""Light work: short, or waiting for others. Example to replace by your own."""

from app.celery_app import celery
from app.contracts import CountWords, TaskName
from app.engine.task import LightTask


@celery.task(name=TaskName.COUNT_WORDS, base=LightTask, bind=True, pydantic=True)
def count_words(self: LightTask, payload: CountWords) -> dict[str, int]:
    """Count the words, lines and characters of `text`."""
    lines = payload.text.splitlines()
    words = 0
    for number, line in enumerate(lines, start=1):
        words += len(line.split())
        self.progress(number, len(lines))
    return {"words": words, "lines": len(lines), "characters": len(payload.text)}
