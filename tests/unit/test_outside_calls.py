from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from celery.exceptions import SoftTimeLimitExceeded
from celery.utils.serialization import get_pickleable_exception

from app.contracts import Backend
from app.engine.breakers import BreakerOpenError, Pass
from app.engine.errors import PERMANENT, error_of
from app.tasks import outside
from app.tasks.orders import charge_payment, refund_payment
from app.tasks.outside import ANSWER_MAX, OutsideError, RefusedError, meaning

Handler = Callable[[httpx.Request], httpx.Response]


class Record:
    """Stands for the breakers, and notes what they are told."""

    def __init__(self) -> None:
        self.told: list[bool] = []
        self.opened = False

    def enter(self, name: str) -> Pass:
        if self.opened:
            raise BreakerOpenError(name)
        return Pass(name, "1")

    def report(self, leave: Pass, *, well: bool) -> None:  # noqa: ARG002  as the real one
        self.told.append(well)


@pytest.fixture
def breaker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Record]:
    record = Record()
    monkeypatch.setattr(outside, "_breakers", lambda: record)
    return record


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[Handler], None]:
    def use(handler: Handler) -> None:
        client = httpx.Client(transport=httpx.MockTransport(handler), timeout=1)
        context = SimpleNamespace(http=client, settings=SimpleNamespace(outside_url="http://outside.test"))
        monkeypatch.setattr(outside, "worker_context", lambda: context)

    return use


def call() -> dict[str, Any]:
    return charge_payment.post(Backend.PAYMENT, "/charge", step="payment", body={"amount": 1})


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 301, 304])
def test_what_may_pass_is_tried_again(status: int):
    with pytest.raises(OutsideError) as caught:
        meaning("payment", httpx.Response(status))
    assert not isinstance(caught.value, PERMANENT)


@pytest.mark.parametrize("status", [400, 401, 402, 404, 409, 422])
def test_a_refusal_is_not_tried_again_and_says_why(status: int):
    problem = {"type": "urn:problem:payment-refused", "detail": "No money."}
    with pytest.raises(RefusedError) as caught:
        meaning("payment", httpx.Response(status, json=problem))
    assert isinstance(caught.value, PERMANENT)
    assert error_of(caught.value) == {"type": "payment_refused", "message": "No money."}


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b'{"type": 7}', b'{"type": "urn:problem:../x"}'])
def test_a_refusal_without_a_problem_is_one_all_the_same(content: bytes):
    with pytest.raises(RefusedError) as caught:
        meaning("payment", httpx.Response(400, content=content))
    assert error_of(caught.value) == {"type": "refused", "message": "payment answered 400."}


def test_a_refusal_keeps_its_kind_where_celery_copies_it():
    error = RefusedError("payment_refused", "No money.")
    assert error_of(get_pickleable_exception(error)) == {"type": "payment_refused", "message": "No money."}


def test_a_long_detail_is_cut():
    with pytest.raises(RefusedError) as caught:
        meaning("payment", httpx.Response(400, json={"detail": "x" * 10_000}))
    assert len(str(caught.value)) == 500


def test_no_content_is_an_empty_answer_and_no_object_is_none():
    assert meaning("mail", httpx.Response(204)) == {}
    with pytest.raises(OutsideError):
        meaning("mail", httpx.Response(200, json=["a"]))


def test_a_call_carries_its_key(answering: Callable[[Handler], None], breaker: Record):
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"charge": "C-1"})

    answering(handler)
    assert call() == {"charge": "C-1"}
    assert str(seen[0].url) == "http://outside.test/payment/charge"
    assert seen[0].headers["idempotency-key"] == charge_payment.key("payment")
    assert breaker.told == [True]


@pytest.mark.parametrize("status", [402, 429])
def test_a_service_that_refuses_is_well(answering: Callable[[Handler], None], breaker: Record, status: int):
    answering(lambda _: httpx.Response(status))
    with pytest.raises((RefusedError, OutsideError)):
        call()
    assert breaker.told == [True]


@pytest.mark.parametrize(
    "error",
    [httpx.ConnectError("refused"), httpx.ReadTimeout("late"), httpx.RemoteProtocolError("cut"), None],
)
def test_a_service_that_fails_is_not(answering: Callable[[Handler], None], breaker: Record, error: Exception | None):
    def handler(_: httpx.Request) -> httpx.Response:
        if error:
            raise error
        return httpx.Response(500)

    answering(handler)
    with pytest.raises(OutsideError):
        call()
    assert breaker.told == [False]


def test_a_call_that_a_time_limit_ends_speaks_against_the_service_and_is_tried_again(
    answering: Callable[[Handler], None], breaker: Record
):
    def handler(_: httpx.Request) -> httpx.Response:
        raise SoftTimeLimitExceeded

    answering(handler)
    with pytest.raises(OutsideError, match="time was over"):
        call()
    assert breaker.told == [False]


def test_an_answer_is_bounded(answering: Callable[[Handler], None], breaker: Record):
    answering(lambda _: httpx.Response(200, content=b" " * (ANSWER_MAX + 1)))
    with pytest.raises(OutsideError, match="too much"):
        call()
    assert breaker.told == [False]


def test_an_open_breaker_lets_no_call_through(answering: Callable[[Handler], None], breaker: Record):
    breaker.opened = True
    answering(lambda _: pytest.fail("it was called"))
    with pytest.raises(BreakerOpenError) as caught:
        call()
    assert not isinstance(caught.value, PERMANENT)
    assert error_of(caught.value)["type"] == "circuit_open"


def test_an_order_gives_up_in_time_and_what_undoes_it_does_not():
    assert charge_payment.max_retries == 20
    assert charge_payment.backoff_cap == 60
    assert refund_payment.max_retries is None
