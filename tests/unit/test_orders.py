import pytest
from pydantic import ValidationError

from app.contracts import TASKS, FulfilmentRequest, OrderRequest
from app.tasks.fulfilment import SuspectedError, finalize
from app.workflows import DEFINITIONS

ADDRESS = {"street": "Main Street 1", "city": "Berlin", "postcode": "10115", "country": "DE"}
ORDER = {"sku": "lamp", "quantity": 2, "card": "tok_4242", "email": "a@example.org", "address": ADDRESS}
DONE = {
    "inventory": {"sku": "lamp", "quantity": 2, "amount": 5_000},
    "shipping": {"shipment": "S-1", "cost": 690},
    "payment": {"charge": "C-1", "amount": 5_690},
    "confirmation": {"mailed": "a@example.org"},
}
FOUND = {
    "stock": {"sku": "lamp", "quantity": 2, "amount": 5_000},
    "tax": {"percent": 19, "tax": 1_140},
    "address": ADDRESS,
    "fraud": {"score": 0},
    "finalize": {"total": 7_140},
}


def test_an_order_is_a_chain_whose_later_steps_use_what_the_earlier_ones_found():
    steps = DEFINITIONS["orders"].steps(OrderRequest.model_validate(ORDER))
    assert [(step.name, set(step.after)) for step in steps] == [
        ("inventory", set()),
        ("shipping", {"inventory"}),
        ("payment", {"inventory", "shipping"}),
        ("confirmation", {"inventory", "shipping", "payment"}),
    ]
    payloads = {step.name: step.payload(DONE).model_dump() for step in steps}
    assert payloads["payment"] == {"amount": 5_690, "card": "tok_4242"}
    assert payloads["confirmation"]["shipment"] == "S-1"
    assert DEFINITIONS["orders"].outcome(DONE) == {
        "sku": "lamp", "quantity": 2, "amount": 5_690, "charge": "C-1", "shipment": "S-1",
    }  # fmt: skip


def test_every_step_of_an_order_can_be_undone():
    assert all(step.undo for step in DEFINITIONS["orders"].steps(OrderRequest.model_validate(ORDER)))


def test_a_fulfilment_decides_on_all_that_was_found():
    request = {"sku": "lamp", "quantity": 2, "amount": 6_000, "address": ADDRESS}
    *group, last = DEFINITIONS["fulfilment"].steps(FulfilmentRequest.model_validate(request))
    assert [step.after for step in group] == [()] * 4
    assert set(last.after) == {"stock", "tax", "address", "fraud"}
    payload = last.payload(FOUND)
    assert payload.model_dump() == {**request, "tax": 1_140, "score": 0}
    assert DEFINITIONS["fulfilment"].outcome(FOUND) == {"total": 7_140}


def test_the_payloads_are_those_of_the_contracts():
    requests = {"orders": (ORDER, DONE), "fulfilment": ({k: ORDER[k] for k in ("sku", "quantity", "address")}, FOUND)}
    for kind, (request, results) in requests.items():
        definition = DEFINITIONS[kind]
        fields = request if kind == "orders" else {**request, "amount": 100}
        for step in definition.steps(definition.request.model_validate(fields)):
            assert type(step.payload(results)) is TASKS[step.task].payload
            if step.undo:
                assert type(step.undo.payload(results)) is TASKS[step.undo.task].payload


def test_a_suspected_sale_is_refused_before_anything_is_given_away():
    payload = {**FOUND["stock"], "tax": 0, "score": 81, "address": ADDRESS}
    with pytest.raises(SuspectedError, match="81"):
        finalize(payload)


@pytest.mark.parametrize(
    "change",
    [
        {"sku": "a/b"},
        {"sku": ""},
        {"quantity": 0},
        {"quantity": 1_001},
        {"card": "4242424242424242"},
        {"email": "nobody"},
        {"address": {**ADDRESS, "country": "Germany"}},
        {"address": {**ADDRESS, "street": ""}},
        {"more": 1},
    ],
)
def test_an_order_that_cannot_be_is_refused(change: dict[str, object]):
    with pytest.raises(ValidationError):
        OrderRequest.model_validate({**ORDER, **change})
