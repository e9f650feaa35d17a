from collections.abc import Iterator
from http import HTTPStatus

import orjson
import pytest

from app import problems
from app.problems import Problem


def every(kind: type[Problem] = Problem) -> Iterator[type[Problem]]:
    yield kind
    for child in kind.__subclasses__():
        yield from every(child)


def document(problem: Problem) -> dict[str, object]:
    _, _, body = problems.render(problem, instance="/here", request_id="r-1")
    return orjson.loads(body)


def retry_after(problem: Problem) -> str | None:
    _, headers, _ = problems.render(problem, instance="/here", request_id="r-1")
    return headers.get("retry-after")


def test_renders_the_members_of_rfc_9457_and_the_request_id():
    status, headers, body = problems.render(problems.NotFound("No such item."), instance="/here", request_id="r-1")
    assert status == 404
    assert headers == {"content-type": "application/problem+json", "cache-control": "no-store"}
    assert orjson.loads(body) == {
        "type": "urn:problem:not-found",
        "title": "There is nothing here",
        "status": 404,
        "detail": "No such item.",
        "instance": "/here",
        "request_id": "r-1",
    }


def test_documented_schema_requires_what_is_always_rendered():
    rendered = document(Problem(errors=[]))
    assert set(problems.SCHEMA["required"]) == set(document(Problem()))
    assert set(problems.SCHEMA["properties"]) == set(rendered)


def test_detail_is_the_title_unless_one_is_given():
    assert document(problems.Conflict())["detail"] == "The resource is not in a state that allows this"


def test_errors_are_rendered_where_there_are_some():
    rows = [{"loc": ["body", "name"], "msg": "too long", "type": "string_too_long"}]
    assert document(problems.Invalid(errors=rows))["errors"] == rows
    assert document(problems.Invalid(errors=[]))["errors"] == []
    assert "errors" not in document(problems.Invalid())


@pytest.mark.parametrize(("seconds", "latest"), [(0, 1), (1, 2), (2, 3), (5, 7), (10, 15)])
def test_retry_after_is_jittered_within_half_as_much_again(seconds: int, latest: int):
    seen = {retry_after(Problem(retry_after=seconds)) for _ in range(300)}
    assert seen == {str(second) for second in range(seconds, latest + 1)}


def test_retry_after_is_only_there_where_a_repeat_makes_sense():
    assert retry_after(problems.NotFound()) is None
    assert retry_after(problems.Unavailable()) in {"2", "3"}
    assert retry_after(problems.QueueFull()) in {"5", "6", "7"}
    assert retry_after(problems.NotPublished()) in {"2", "3"}


@pytest.mark.parametrize("kind", list(every()))
def test_every_problem_has_a_title_and_the_status_of_an_error(kind: type[Problem]):
    title = kind().title
    assert title
    assert "\n" not in title
    assert not title.endswith(".")
    assert HTTPStatus(kind.status) >= 400
    assert title == problems.example(kind)["description"]


def test_every_problem_has_a_slug_of_its_own():
    slugs = [kind.slug for kind in every()]
    assert sorted(slugs) == sorted(set(slugs))


def test_every_503_says_when_to_come_back():
    assert all(kind.retry_after for kind in every() if kind.status == HTTPStatus.SERVICE_UNAVAILABLE)


def test_framework_statuses_map_to_problems_of_that_status():
    assert all(kind.status == status for status, kind in problems.BY_STATUS.items())
    assert problems.BY_STATUS[HTTPStatus.SERVICE_UNAVAILABLE] is problems.Unavailable
