"""Start SecantusDB, the native stack's database where there is no mongod: for development and tests only.

It takes the arguments of `secantusd-py`. The library decodes the whole collection even for
`find().sort("_id").limit(20)`. Here a find with a limit is read as mongod reads it, until the page is full: sorted
by `_id` alone along the `_id` index, unsorted in the order of the records. Every other find goes to the library.
"""
# ruff: noqa: SLF001  -- it works on the library's insides and therefore accepts one version only

import logging
import signal
import socket
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from datetime import datetime
from importlib.metadata import version
from itertools import islice
from typing import Any

WRITTEN_FOR = "0.7.0b3"
INSIDES = ("_coll_options", "_projection_metas", "_scan_docs", "_single_sort_spec", "_try_index_id_keys")
try:
    import bson
    from secantus import cli, deadline
    from secantus.projection import apply_projection_batch
    from secantus.query import matches
    from secantus.server import SecantusDBServer
    from secantus.storage import _NAT_SEQ_TABLE, Storage, _doc_table_for, _id_key, _unframe_doc_value, wt

    find_in_library, start_server, stop_server = Storage.find_matching, SecantusDBServer.start, SecantusDBServer.stop
    open_in_library, try_index_in_library = wt.wiredtiger_open, Storage._try_index_id_keys
    usable = version("SecantusDB") == WRITTEN_FOR and all(hasattr(Storage, name) for name in INSIDES)
    problem = "" if usable else f"version {version('SecantusDB')} is installed"
except (ImportError, AttributeError) as error:
    problem = str(error)
if problem:
    sys.exit(f"embedded database: this launcher works with SecantusDB {WRITTEN_FOR} only: {problem}")

Document = dict[str, Any]
# Types of `_id` whose index keys sort as their values do. Those of subdocuments do not, those of floats not always.
SORTABLE = (bson.ObjectId, str, int, bson.Int64, datetime)
BOUNDS = {"$gt": 0, "$gte": 0, "$lt": 1, "$lte": 1}  # operator: which end of the range it sets
PLAIN = {"skip", "limit", "sort", "projection", "let"}  # `let` is always given: it carries $$NOW
UNUSUAL = {"capped", "clusteredIndex", "collation", "timeseries", "viewOn"}
FEW = 200  # documents left by an index that are better read and sorted than searched for along the `_id` index
TRANSACTION_SECONDS = 15.0  # idle ones are ended then, as mongod does where it is told so
CHUNK = 64  # records read at a time under the library's lock; they are decoded outside it


def id_range(filter_: Document) -> tuple[bytes, bytes] | None:
    """Return the lowest and the highest key that can match, None if `_id` has another condition than bounds."""
    if "_id" not in filter_:
        return b"", b"\xff"
    bounds = filter_["_id"]
    if not isinstance(bounds, dict) or not bounds or not bounds.keys() <= BOUNDS.keys():
        return None
    if any(type(value) not in SORTABLE for value in bounds.values()):
        return None
    ends: tuple[list[bytes], list[bytes]] = ([], [])
    for operator, value in bounds.items():
        ends[BOUNDS[operator]].append(_id_key(value))
    # A key begins with the rank of its type, and a bound matches values of its own type only.
    rank = (ends[0] or ends[1])[0][0]
    return max(ends[0], default=bytes([rank])), min(ends[1], default=bytes([rank + 1]))


def walk_ids(storage: Any, place: tuple[str, str], keys: tuple[bytes, bytes], step: int) -> Iterator[int]:
    """Yield record numbers in the order of `_id`."""
    ids = storage._cursor(_NAT_SEQ_TABLE)
    advance = ids.next if step > 0 else ids.prev
    ids.set_key(*place, keys[0] if step > 0 else keys[1])
    side = ids.search_near()  # 0: found; -1 or 1: stands on the neighbour below or above
    if side == wt.WT_NOTFOUND or (side * step < 0 and advance() != 0):
        return
    while True:
        db, coll, key = ids.get_key()
        if (db, coll) != place or not keys[0] <= bytes(key) <= keys[1]:
            return
        yield ids.get_value()
        if advance() != 0:
            return


def read(storage: Any, place: tuple[str, str], numbers: Iterable[int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the key of the `_id` and the encoded document of each record."""
    records = storage._cursor_optional(_doc_table_for(*place))
    for number in numbers if records is not None else ():
        records.set_key(*place, number)
        if records.search() == 0:
            yield _unframe_doc_value(bytes(records.get_value()))


def candidates(storage: Any, place: tuple[str, str], filter_: Document, sort: Any) -> Iterable[Any] | None:
    """Return what the library would look at, in the order asked for; None if this is a find for the library."""
    field, step = storage._single_sort_spec(sort)
    keys = id_range(filter_)
    if keys is None or (sort and field != "_id") or place[0] in {"admin", "config", "local"} or "system." in place[1]:
        return None
    collection = storage._coll_options(*place)
    if collection is None or collection.keys() & UNUSUAL:
        return None
    found = storage._try_index_id_keys(*place, filter_)
    chosen: Collection[int] | None = None if found is None else dict.fromkeys(found)
    if chosen is None and not sort:
        return ((key, blob) for _, key, blob in storage._scan_docs(*place))
    if chosen is not None and (not sort or len(chosen) <= FEW):
        rows = read(storage, place, chosen)
        return sorted(rows, reverse=step < 0) if sort else rows
    return read(storage, place, (n for n in walk_ids(storage, place, keys, step) if chosen is None or n in chosen))


def read_page(storage: Any, place: tuple[str, str], filter_: Document, options: Document) -> list[Document] | None:
    """Decode and match candidates until the page is full."""
    skip, limit, sort = options.get("skip", 0), options.get("limit", 0), options.get("sort")
    if limit <= 0 or any(value is not None for name, value in options.items() if name not in PLAIN):
        return None
    page: list[Document] = []
    storage._refresh_read_snapshot()
    with storage._lock:
        if (found := candidates(storage, place, filter_, sort)) is None:
            return None
    records = iter(found)
    chunk = [(b"", b"")] * CHUNK
    while len(chunk) == CHUNK:
        with storage._lock:
            if storage._closed:
                raise RuntimeError("Storage is closed")
            chunk = list(islice(records, CHUNK))
        for _, blob in chunk:
            deadline.check()
            document = bson.decode(blob)
            if not matches(document, filter_, vars=options.get("let")):
                continue
            if sort and type(document.get("_id")) not in SORTABLE:
                return None
            page.append(document)
            if len(page) == skip + limit:
                return page[skip:]
    return page[skip:]


def find_matching(self: Any, db: str, coll: str, filter: Document | None = None, **options: Any) -> list[Document]:  # noqa: A002
    """Stand in for `Storage.find_matching`: the same answers without decoding more than the page needs."""
    page = read_page(self, (db, coll), filter or {}, options)
    if page is None:
        page = list(find_in_library(self, db, coll, filter, **options))
    elif projection := options.get("projection"):
        filter_, sort = filter or {}, options.get("sort")
        metas = self._projection_metas(db, coll, page, projection, filter_, sort, None, None)
        page = list(apply_projection_batch(page, projection, filter_, metas=metas, has_sort=bool(sort)))
    return page


def try_index(self: Any, db: str, coll: str, filter: Document, **options: Any) -> list[int] | None:  # noqa: A002
    """Look fields up although `$or` or `$and` stands beside them (find_one_and_update always adds one).

    Who asks compares each document with the whole filter afterwards.
    """
    fields = {name: value for name, value in filter.items() if not name.startswith("$")}
    found: list[int] | None = try_index_in_library(self, db, coll, fields or filter, **options)
    return found


def open_engine(home: str, config: str) -> Any:
    """Give each commit to the kernel: the library lets it lie in memory for a while, and SIGKILL would lose it."""
    lazy, written = "transaction_sync=(enabled=false,method=fsync)", "transaction_sync=(enabled=true,method=none)"
    return open_in_library(home, config.replace(lazy, written))


def start(self: Any) -> None:
    """Say what this is once it listens."""
    self.transactions._lifetime = TRANSACTION_SECONDS
    start_server(self)
    text = "SecantusDB %s on %s:%d: an embedded database, for development and tests only"
    logging.getLogger("embedded_database").warning(text, WRITTEN_FOR, self.host, self.port)


def stop(self: Any) -> None:
    """Close at once: no second signal cuts it short, accept() is woken, no writer waits for an open transaction."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    self._stop_event.set()
    with suppress(OSError, AttributeError):
        self._socket.shutdown(socket.SHUT_RDWR)
    self.transactions.abort_all()
    stop_server(self)


def main() -> int:
    """Run the daemon, at warning level unless the arguments say otherwise."""
    Storage.find_matching, wt.wiredtiger_open = find_matching, open_engine
    Storage._try_index_id_keys = try_index
    SecantusDBServer.start, SecantusDBServer.stop = start, stop
    return int(cli.main(["--log-level", "WARNING", *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())
