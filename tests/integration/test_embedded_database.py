"""The embedded database answers as its library does, decodes no more than a page needs, keeps what it confirmed."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import bson
import pymongo
import pytest
from bson import MinKey, ObjectId
from pymongo.client_session import ClientSession
from pymongo.collection import Collection
from pymongo.errors import PyMongoError

if find_spec("secantus") is None and "CI" not in os.environ:
    pytest.skip("needs SecantusDB (the native requirements)", allow_module_level=True)

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "deploy" / "native" / "embedded_database.py"
START_SECONDS = 30
STOP_SECONDS = 10
RANK = {int: 1, str: 2, ObjectId: 3}  # the order of types in MongoDB

Document = dict[str, Any]
Test = Callable[[Document], bool]


@contextmanager
def running(data: Path) -> Iterator[tuple[pymongo.MongoClient[Document], subprocess.Popen[bytes]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--host", "127.0.0.1", "--port", str(port), "--storage-path", str(data / "db")]
    with (data / "log").open("ab") as log:
        process = subprocess.Popen([sys.executable, LAUNCHER, *arguments], stdout=log, stderr=log, cwd=data)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert process.poll() is None, (data / "log").read_text()
                assert time.monotonic() < deadline, "it does not listen"
                time.sleep(0.05)
        url = f"mongodb://127.0.0.1:{port}/?directConnection=true&serverSelectionTimeoutMS=1000"
        with pymongo.MongoClient[Document](url) as client:
            client.admin.command("ping")
            yield client, process
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pymongo.MongoClient[Document]]:
    with running(tmp_path_factory.mktemp("embedded")) as (client, _):
        yield client


def order(document: Document) -> tuple[int, Any]:
    return RANK[type(document["_id"])], document["_id"]


def new_id(rng: random.Random, *, mixed: bool) -> int | str | ObjectId:
    if not mixed:
        return ObjectId(rng.randbytes(12))
    if rng.random() < 0.5:
        return rng.randint(-(10**9), 10**9)
    return "".join(rng.choices("ab\x00é\U0001f600~", k=rng.randint(1, 9)))


def filled(client: pymongo.MongoClient[Document], name: str, rng: random.Random) -> Collection[Document]:
    """Several hundred documents under ids in no order, with neighbours on both sides in the same index."""
    for neighbour, size in ((name[:-1], 20), (name, 600), (name + "2", 20)):
        client.pages.drop_collection(neighbour)
        ids = {new_id(rng, mixed=name == "mixed") for _ in range(size)}
        documents = [{"_id": i, "category": rng.choice("abc"), "n": rng.randrange(50)} for i in ids]
        rng.shuffle(documents)
        client.pages[neighbour].insert_many(documents)
    return client.pages[name]


def random_filter(rng: random.Random) -> tuple[Document, Test]:
    """A query and what it means."""
    category, n = rng.choice("abcx"), rng.randrange(50)
    choices: list[tuple[Document, Test]] = [
        ({}, lambda _: True),
        ({"category": category}, lambda d: d["category"] == category),
        ({"n": {"$gte": n}}, lambda d: d["n"] >= n),
        ({"$or": [{"category": category}, {"n": n}]}, lambda d: d["category"] == category or d["n"] == n),
        ({"category": category, "n": {"$lt": n}}, lambda d: d["category"] == category and d["n"] < n),
    ]
    return rng.choice(choices)


def random_bounds(rng: random.Random, documents: list[Document], *, mixed: bool) -> tuple[Document, Test]:
    """Bounds on `_id`, of stored ids and of others; they match ids of their own type only."""
    compare: dict[str, Callable[[Any, Any], bool]] = {
        "$gt": lambda a, b: a > b,
        "$gte": lambda a, b: a >= b,
        "$lt": lambda a, b: a < b,
        "$lte": lambda a, b: a <= b,
    }
    chosen = rng.choice([[], [rng.choice(["$gt", "$gte"])], [rng.choice(["$lt", "$lte"])], ["$gte", "$lt"]])
    bounds = {o: rng.choice([rng.choice(documents)["_id"], new_id(rng, mixed=mixed)]) for o in chosen}
    return {"_id": bounds} if bounds else {}, lambda d: all(
        type(d["_id"]) is type(bound) and compare[operator](d["_id"], bound) for operator, bound in bounds.items()
    )


def check_pages(collection: Collection[Document], rng: random.Random, session: ClientSession | None = None) -> None:
    """Thirty random pages are what sorting and filtering the full read gives."""
    everything = list(collection.find(session=session))
    for _ in range(30):
        query, wanted = random_filter(rng)
        bounds, inside = random_bounds(rng, everything, mixed=collection.name == "mixed")
        direction, skip, limit = rng.choice([1, -1]), rng.choice([0, 0, 7, 500]), rng.choice([1, 3, 20, 100, 1000])
        fields = rng.choice([{"_id", "category", "n"}, {"_id", "category"}, {"n"}])
        projection = None if len(fields) == 3 else {"_id": "_id" in fields} | dict.fromkeys(fields - {"_id"}, 1)
        found = collection.find(query | bounds, projection, session=session)
        page = list(found.sort("_id", direction).skip(skip).limit(limit))
        expected = sorted((d for d in everything if wanted(d) and inside(d)), key=order, reverse=direction < 0)
        expected = [{k: v for k, v in d.items() if k in fields} for d in expected[skip : skip + limit]]
        assert page == expected, (query, bounds, direction, skip, limit)
    for _ in range(5):  # unsorted finds have an order too, that of the records or of an index
        query, _ = random_filter(rng)
        page = list(collection.find(query, session=session).skip(3).limit(20))
        assert page == list(collection.find(query, session=session))[3:23], query


def change(collection: Collection[Document], rng: random.Random, session: ClientSession | None = None) -> None:
    ids = [d["_id"] for d in collection.find({}, ["_id"], session=session)]
    rng.shuffle(ids)
    collection.delete_many({"_id": {"$in": ids[:100]}}, session=session)
    collection.update_many({"_id": {"$in": ids[100:200]}}, {"$set": {"category": "x"}}, session=session)
    collection.insert_many([{"_id": i, "category": "b", "n": 1} for i in ids[:30]], session=session)


@pytest.mark.parametrize("name", ["objectids", "mixed"])
def test_random_pages_equal_the_full_read(client: pymongo.MongoClient[Document], name: str) -> None:
    rng = random.Random(f"pages of {name}")
    collection = filled(client, name, rng)
    check_pages(collection, rng)
    change(collection, rng)
    check_pages(collection, rng)
    collection.create_index("n")
    collection.create_index([("category", 1), ("_id", 1)])
    check_pages(collection, rng)
    change(collection, rng)
    check_pages(collection, rng)


@pytest.mark.parametrize("name", ["objectids", "mixed"])
def test_pages_in_a_transaction_see_its_writes_and_no_others_do(
    client: pymongo.MongoClient[Document], name: str
) -> None:
    rng = random.Random(f"transaction on {name}")
    collection = filled(client, name, rng)
    before = sorted(collection.find(), key=order)[:50]
    with client.start_session() as session:
        session.start_transaction()
        change(collection, rng, session)
        check_pages(collection, rng, session)
        assert list(collection.find().sort("_id", 1).limit(50)) == before
        session.abort_transaction()
    assert list(collection.find().sort("_id", 1).limit(50)) == before
    check_pages(collection, rng)


@pytest.mark.parametrize("direction", [1, -1])
def test_following_the_pages_gives_every_document_once(client: pymongo.MongoClient[Document], direction: int) -> None:
    collection = filled(client, "objectids", random.Random("following"))
    seen: list[Document] = []
    bounds: Document = {}
    while page := list(collection.find({"category": "a"} | bounds).sort("_id", direction).limit(9)):
        seen += page
        assert len(seen) <= 600, "it does not end"
        bounds = {"_id": {"$gt" if direction > 0 else "$lt": page[-1]["_id"]}}
    expected = [d for d in collection.find() if d["category"] == "a"]
    assert seen == sorted(expected, key=order, reverse=direction < 0)


def test_ids_that_the_index_sorts_otherwise_are_left_to_the_library(client: pymongo.MongoClient[Document]) -> None:
    collection = client.pages.unsortable
    collection.drop()
    ids = [{"b": 2, "a": "long"}, {"b": 3}, {"b": 1, "a": "longer"}, 1e200, 5, 2.5]
    collection.insert_many([{"_id": i} for i in ids])
    expected = [d["_id"] for d in collection.find().sort("_id", 1)]
    assert expected == [2.5, 5, 1e200, {"b": 1, "a": "longer"}, {"b": 2, "a": "long"}, {"b": 3}]
    assert [d["_id"] for d in collection.find().sort("_id", 1).limit(5)] == expected[:5]
    assert [d["_id"] for d in collection.find({"_id": {"$gt": 2.5}}).sort("_id", -1).limit(5)] == [1e200, 5]
    assert [d["_id"] for d in collection.find({"_id": {"$gt": MinKey()}}).sort("_id", 1).limit(2)] == [2.5, 5]


@pytest.mark.parametrize(
    ("query", "sort", "most"),
    [
        pytest.param({}, {"_id": 1}, 20, id="sorted"),
        pytest.param({}, {"_id": -1}, 20, id="sorted backwards"),
        pytest.param({"_id": {"$gt": 500}}, {"_id": 1}, 21, id="after a bound"),
        pytest.param({"_id": {"$lt": 500}}, {"_id": -1}, 21, id="before a bound"),
        pytest.param({"tenth": 0}, {"_id": 1}, 200, id="filtered"),
        pytest.param({"half": 0}, {"_id": -1}, 20, id="filtered by an index"),
        pytest.param({}, None, 20, id="unsorted"),
        pytest.param({"half": 0}, None, 20, id="unsorted, filtered by an index"),
    ],
)
def test_a_page_decodes_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, query: Document, sort: Document | None, most: int
) -> None:
    launcher = import_module("deploy.native.embedded_database")
    monkeypatch.setattr(launcher.Storage, "find_matching", launcher.find_matching)
    decoded: list[Document] = []

    def decode(*args: Any, **options: Any) -> Document:
        decoded.append(bson_decode(*args, **options))
        return decoded[-1]

    bson_decode = bson.decode
    monkeypatch.setattr(bson, "decode", decode)
    with launcher.Storage(str(tmp_path), durable=False) as storage:
        storage.insert("db", "coll", [{"_id": i, "tenth": i % 10, "half": i % 2} for i in range(1000)])
        storage.create_index("db", "coll", "half_1", {"half": 1})
        decoded.clear()
        page = storage.find_matching("db", "coll", query, sort=sort, limit=20, let={"NOW": 0})
    assert len(page) == 20
    assert len([d for d in decoded if "tenth" in d]) <= most


def test_an_index_is_used_although_an_or_stands_beside_its_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = import_module("deploy.native.embedded_database")
    monkeypatch.setattr(launcher.Storage, "_try_index_id_keys", launcher.try_index)
    with launcher.Storage(str(tmp_path), durable=False) as storage:
        storage.insert("db", "coll", [{"_id": i} for i in range(1000)])
        assert len(storage._candidates_iter("db", "coll", {"_id": 7, "$or": [{"a": 1}]})) == 1  # noqa: SLF001
        assert len(storage._candidates_iter("db", "coll", {"$or": [{"_id": 7}]})) == 1000  # noqa: SLF001


def test_conditions_beside_an_or_all_count(client: pymongo.MongoClient[Document]) -> None:
    rows = client.pages.versions
    rows.insert_many([{"_id": i, "half": i % 2, "version": i} for i in range(100)])
    rows.create_index("half")
    older = {"$or": [{"version": {"$lt": 10}}, {"version": 50}]}
    assert sorted(d["_id"] for d in rows.find({"half": 0, **older})) == [0, 2, 4, 6, 8, 50]
    assert rows.update_one({"_id": 20, **older}, {"$set": {"seen": True}}).matched_count == 0
    assert rows.find_one_and_update({"_id": 21, **older}, {"$set": {"seen": True}}) is None
    assert rows.find_one_and_update({"half": 1, **older}, {"$inc": {"version": 100}}, sort=[("_id", -1)])["_id"] == 9
    assert rows.delete_many({"half": 1, "$and": [{"version": {"$gt": 90}}]}).deleted_count == 6


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_what_was_confirmed_survives_the_end(tmp_path: Path, name: str) -> None:
    confirmed = 0
    for _ in range(2):
        with running(tmp_path) as (client, process):
            collection = client.kept.documents
            assert collection.count_documents({}) == confirmed
            for _ in range(100):
                collection.insert_one({"_id": confirmed})
                confirmed += 1
            process.send_signal(signal.Signals[name])
            deadline = time.monotonic() + STOP_SECONDS
            while process.poll() is None and time.monotonic() < deadline:
                process.send_signal(signal.Signals[name])  # a second one must not cut the closing short
                time.sleep(0.002)
            assert process.returncode == (0 if name == "SIGTERM" else -signal.SIGKILL)
    with running(tmp_path) as (client, _):
        assert sorted(d["_id"] for d in client.kept.documents.find()) == list(range(confirmed))


def test_an_open_transaction_does_not_delay_the_end(tmp_path: Path) -> None:
    with running(tmp_path) as (client, process), client.start_session() as session:
        collection = client.kept.documents
        collection.insert_one({"_id": 1})
        session.start_transaction()
        collection.update_one({"_id": 1}, {"$set": {"by": "transaction"}}, session=session)

        def write() -> None:
            with suppress(PyMongoError):
                collection.update_one({"_id": 1}, {"$set": {"by": "other"}})

        waiting = threading.Thread(target=write)
        waiting.start()
        time.sleep(0.5)
        process.terminate()
        process.wait(2)
        waiting.join()
    with running(tmp_path) as (client, _):
        assert client.kept.documents.find_one() != {"_id": 1, "by": "transaction"}


def test_the_log_says_once_what_it_is(tmp_path: Path) -> None:
    with running(tmp_path) as (client, _):
        client.some.documents.insert_one({})
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert "embedded database, for development and tests only" in line


def test_another_version_of_the_library_is_refused(tmp_path: Path) -> None:
    metadata = tmp_path / "secantusdb-9.9.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: SecantusDB\nVersion: 9.9.9\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, LAUNCHER, "--port", "1"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "0.7.0b3" in line
    assert "9.9.9" in line
    assert done.stdout == ""
