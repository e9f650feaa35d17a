import json
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest

from app.contracts import EVENTS, SUBSCRIPTIONS, EventName, ItemCreated, OrderPlaced, Service, UserCreated, subscribed
from app.database import outbox
from app.engine.archive import failure_event
from app.engine.dead_letters import BAD_ENVELOPE, Death, letter_of_event
from app.engine.envelope import BODY_MAX, EnvelopeError, Event, marker_of
from app.engine.events import Handlers
from app.engine.outbox import envelope_of

NOON = datetime(2026, 1, 2, 12, 0, 0, 5_000, tzinfo=UTC)
USER = Event.new("e-1", UserCreated(user_id="u-1"), kind=EventName.USER_CREATED, source="/test", time=NOON)


def body(**changes: Any) -> bytes:
    document = {name: value for name, value in {**USER.document(), **changes}.items() if value is not ...}
    return orjson.dumps(document)


def test_an_envelope_is_a_cloud_event():
    assert USER.document() == {
        "specversion": "1.0",
        "id": "e-1",
        "type": "user.created",
        "source": "/test",
        "time": "2026-01-02T12:00:00.005Z",
        "datacontenttype": "application/json",
        "dataversion": 1,
        "data": {"user_id": "u-1", "email": ""},
    }


def test_an_envelope_is_read_as_it_was_written():
    assert Event.parse(orjson.dumps(USER.document())) == USER
    lines = [{"sku": "s", "quantity": 2}]
    order = OrderPlaced.model_validate({"order_id": "o", "customer_id": "c", "lines": lines, "total": 5})
    placed = Event.new("e-2", order, kind=EventName.ORDER_PLACED, source="/test")
    assert Event.parse(orjson.dumps(placed.document())) == placed


def test_extensions_that_nobody_knows_here_pass():
    assert Event.parse(body(traceparent="00-0af7", subject="u-1")) == USER


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b'"x"',
        b"[" * 100_000,
        body(specversion="0.3"),
        body(specversion=1.0),
        body(id=...),
        body(id=""),
        body(id=7),
        body(id="x" * 256),
        body(source=""),
        body(source="with space"),
        body(time="yesterday"),
        body(time="2026-01-02T12:00:00"),
        body(time=...),
        body(type="user.eaten"),
        body(type=...),
        body(dataversion=2),
        body(dataversion="1"),
        body(dataversion=...),
        body(datacontenttype="text/xml"),
        body(data=...),
        body(data=None),
        body(data={}),
        body(data={"user_id": "u", "more": 1}),
        body(data={"user_id": "u", "email": "x" * BODY_MAX}),
    ],
)
def test_what_is_broken_or_not_known_is_no_event(broken: bytes):
    with pytest.raises(EnvelopeError) as raised:
        Event.parse(broken)
    assert len(str(raised.value)) < 500


def test_what_an_envelope_holds_is_not_repeated_in_the_fault():
    with pytest.raises(EnvelopeError) as raised:
        Event.parse(body(data={"user_id": 5, "email": "secret@example"}))
    assert "secret" not in str(raised.value)


# As RabbitMQ's tutorial on topics has them, and what its exchange does with words that are none.
@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("user.created", ["user.created"], ["user", "user.deleted", "user.created.now", "xuser.created"]),
        ("user.*", ["user.created", "user.deleted"], ["user", "user.created.now", "order.created"]),
        ("*.created", ["user.created", "item.created"], ["created", "a.b.created"]),
        ("user.#", ["user", "user.created", "user.created.now"], ["order", "users.created"]),
        ("#", ["", "user", "a.b.c.d"], []),
        ("#.failed", ["failed", "task.failed", "a.b.failed"], ["failed.task"]),
        ("a.#.z", ["a.z", "a.b.z", "a.b.c.z"], ["a", "z", "a.b"]),
        ("*.*", ["a.b"], ["a", "a.b.c"]),
    ],
)
def test_patterns_are_those_of_a_topic_exchange(pattern: str, matching: list[str], others: list[str]):
    assert [word for word in [*matching, *others] if subscribed(pattern, word)] == matching


def test_handlers_are_found_by_pattern_in_their_order():
    on = Handlers()

    @on("user.*")
    async def first(_event: Event, _session: Any, _database: Any) -> None: ...

    @on("#")
    async def second(_event: Event, _session: Any, _database: Any) -> None: ...

    assert on.of("user.created") == [first, second]
    assert on.of("order.placed") == [second]
    assert Handlers().of("user.created") == []


def test_every_type_of_event_has_a_contract_and_services_subscribe_to_some():
    assert set(EVENTS) == set(EventName)
    assert set(SUBSCRIPTIONS) <= set(Service)
    for patterns in SUBSCRIPTIONS.values():
        for pattern in patterns:
            assert any(subscribed(pattern, kind) for kind in EventName), pattern
    assert {kind for kind in EventName if EVENTS[kind].internal} == {"item.created", "task.failed"}


def test_a_failed_task_is_told_of_by_its_contract():
    shown = {"task_id": "t", "name": "n", "queue": "q", "reason": "permanent", "attempts": 3, "request_id": "r"}
    letter = {**shown, "key": "t:1", "error": {"type": "E", "message": "m"}, "died_at": NOON, "owner": "secret"}
    event = Event.parse(orjson.dumps(failure_event(letter)))
    assert (event.id, event.type, event.source) == ("t:1", "task.failed", "/tasks")
    assert event.data.model_dump() == {**shown, "error": {"type": "E", "message": "m"}}


def test_what_the_outbox_holds_is_an_event_of_its_id():
    told = ItemCreated(item_id="i", name="é\0😀", category=None)
    row = outbox.row(EventName.ITEM_CREATED, told, source="/items")
    event = Event.parse(orjson.dumps(envelope_of(row)))
    assert (event.id, event.data, event.source) == (str(row["_id"]), told, "/items")
    assert event.time.startswith(row["time"].isoformat()[:23])


def test_what_a_newer_process_wrote_into_the_outbox_is_relayed_all_the_same():
    row = outbox.row(EventName.ITEM_CREATED, ItemCreated(item_id="i", name="n"), source="/items")
    newer = envelope_of({**row, "type": "item.shipped", "dataversion": 9, "data": '{"odd": 1}'})
    assert (newer["type"], newer["dataversion"], newer["data"]) == ("item.shipped", 9, {"odd": 1})


def test_a_marker_tells_services_sources_and_ids_apart():
    other = Event.new("e-1", UserCreated(user_id="u-1"), kind=EventName.USER_CREATED, source="/other")
    assert len({marker_of("a", USER), marker_of("b", USER), marker_of("a", other)}) == 3


def test_a_letter_tells_what_the_service_noted_and_each_replay_has_its_own():
    death = Death("delivery_limit", "events.audit")
    noted = {"reason": "exhausted", "error": {"type": "OSError", "message": "no"}, "attempts": 4}
    letter = letter_of_event(USER, death, noted, "")
    assert (letter["reason"], letter["error"]["type"], letter["attempts"]) == ("exhausted", "OSError", 4)
    assert json.loads(letter["message"]["event"]) == USER.document()
    silent = letter_of_event(USER, death, None, "")
    assert (silent["reason"], silent["attempts"]) == ("poison", 0)
    keys = {letter_of_event(USER, death, noted, replay)["key"] for replay in ("", "a", "b")}
    assert len(keys) == 3
    assert letter["key"] == silent["key"]
    assert letter["reason"] != BAD_ENVELOPE
