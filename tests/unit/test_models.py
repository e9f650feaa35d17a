import itertools
import math
from typing import Any

import bson
import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from app.models import CountWordsRequest, ItemContent, Metadata, ProcessRequest

METADATA = TypeAdapter(Metadata)


def nested(depth: int, innermost: Any = 1) -> dict[str, Any]:
    """Metadata whose innermost value has a path of `depth` keys."""
    for _ in range(depth):
        innermost = {"k": innermost}
    return innermost


def refused(value: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        METADATA.validate_python(value)
    (error,) = caught.value.errors()
    return error["msg"]


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": None, "b": True, "c": [1, 1.5, "x", [], {}]},
        {"a$": "$a.b\0"},  # only keys are bound
        {"höhe": "ä€😀"},
        {"top": 2**63 - 1, "bottom": -(2**63)},
        nested(8),
        {"k": [[[[[[[1]]]]]]]},
    ],
)
def test_metadata_that_can_be_stored_is_kept_as_it_is(value: dict[str, Any]):
    assert METADATA.validate_python(value) == value


@pytest.mark.parametrize("key", ["", "$set", "a.b", ".", "a\0b"])
@pytest.mark.parametrize("place", [lambda bad: bad, lambda bad: {"k": bad}, lambda bad: {"k": [0, bad]}])
def test_metadata_keys_that_bson_or_a_query_trips_on_are_refused(key: str, place: Any):
    assert "has a key that is empty, starts with $, or contains a dot or NUL" in refused(place({key: 1}))


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**40])
def test_metadata_integers_past_64_bits_are_refused(number: int):
    assert "64 bits" in refused({"k": number})
    assert "64 bits" in refused({"k": [number]})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_metadata_numbers_that_are_not_finite_are_refused(number: float):
    assert "not finite" in refused({"k": number})
    assert "not finite" in refused({"k": [{"k": number}]})


@pytest.mark.parametrize("value", [{"k": "\ud800"}, {"\udfff": 1}, {"k": ["a\ud800b"]}])
def test_metadata_lone_surrogates_are_refused(value: dict[str, Any]):
    assert "surrogates" in refused(value)


@pytest.mark.parametrize("value", [nested(9), nested(1, [[[[[[[[1]]]]]]]]), nested(5000)])
def test_metadata_deeper_than_8_levels_is_refused(value: dict[str, Any]):
    assert "deeper than 8 levels" in refused(value)


def test_metadata_is_bound_in_bytes_of_json():
    frame = len('{"k":""}')
    fits = {"k": "x" * (16 * 1024 - frame)}
    assert METADATA.validate_python(fits) == fits
    assert "larger than 16384 bytes" in refused({"k": "x" * (16 * 1024 - frame + 1)})
    assert "larger than 16384 bytes" in refused({"k": "é" * (8 * 1024)})


# What JSON can say and something behind the API might trip on, and what is harmless.
KEYS = ["a", " ", "é😀", "a$", "$a", ".", "a.b", "", "\0", "a\0b", "\ud800", "a\udfffb"]
SCALARS = [None, True, 0, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**63) - 1, 10**40]
SCALARS += [0.5, 1e308, 5e-324, math.nan, math.inf, -math.inf, "", "é😀", "\0", "$a.b", "\ud800", "a\udfffb"]
PLACES = [
    lambda key, value: {key: value},
    lambda key, value: {key: [value]},
    lambda key, value: {"k": {key: value}},
    lambda key, value: {"k": [{}, {key: [[value]]}]},
]


@pytest.mark.parametrize("place", PLACES)
def test_what_metadata_accepts_bson_keeps(place: Any):
    accepted = 0
    for key, value in itertools.product(KEYS, SCALARS):
        try:
            metadata = METADATA.validate_python(place(key, value))
        except ValidationError:
            continue
        assert bson.decode(bson.encode({"metadata": metadata})) == {"metadata": place(key, value)}
        accepted += 1
    assert accepted == 4 * 13


@pytest.mark.parametrize(("kind", "field"), [(ProcessRequest, "data"), (CountWordsRequest, "text")])
def test_text_is_bound_in_bytes_not_characters(kind: type[BaseModel], field: str):
    for fits in ("x" * 65_536, "é" * 32_768, "😀" * 16_384, ""):
        assert getattr(kind(**{field: fits}), field) == fits
    for large in ("x" * 65_537, "é" * 32_769, "😀" * 16_385):
        with pytest.raises(ValidationError, match="larger than 65536 bytes"):
            kind(**{field: large})


def test_text_with_a_lone_surrogate_is_refused():
    with pytest.raises(ValidationError, match="surrogates"):
        ProcessRequest(data="\ud800")


@pytest.mark.parametrize("field", ["name", "description", "category"])
def test_item_fields_with_a_lone_surrogate_are_refused(field: str):
    # A digest is made of them, and MongoDB is to take them.
    with pytest.raises(ValidationError, match=field):
        ItemContent(**{"name": "x", field: "\ud800"})


@pytest.mark.parametrize(
    ("kind", "body"),
    [(ItemContent, {"name": "x"}), (ProcessRequest, {"data": "x"}), (CountWordsRequest, {"text": "x"})],
)
def test_unknown_fields_are_refused(kind: type[BaseModel], body: dict[str, str]):
    kind(**body)
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        kind(**body, prioirty="high")


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": "x" * 201},
        {"name": None},
        {"description": "x" * 2001},
        {"category": ""},
        {"category": "x" * 101},
        {"metadata": []},
        {"metadata": None},
    ],
)
def test_item_fields_out_of_bounds_are_refused(change: dict[str, Any]):
    with pytest.raises(ValidationError):
        ItemContent(**{"name": "x", **change})


def test_item_fields_at_their_bounds_are_taken():
    item = ItemContent(name="n" * 200, description="d" * 2000, category="c" * 100)
    assert item.metadata == {}
    assert ItemContent(name="n").category is None


@pytest.mark.parametrize("change", [{"iterations": 0}, {"iterations": 100_001}, {"priority": "urgent"}])
def test_process_fields_out_of_bounds_are_refused(change: dict[str, Any]):
    with pytest.raises(ValidationError):
        ProcessRequest(**{"data": "x", **change})


def test_process_has_defaults():
    request = ProcessRequest(data="x")
    assert (request.iterations, request.priority) == (100, "normal")
    assert ProcessRequest(data="x", iterations=100_000, priority="low").iterations == 100_000
