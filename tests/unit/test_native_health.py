import os
import socket
import threading
import time

import pytest
from pymongo.errors import OperationFailure, ServerSelectionTimeoutError

from deploy.native import health


@pytest.fixture
def answering():
    """Make a server that reads once and answers this to every connection; its port."""
    servers = []

    def start(answer):
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1000)
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        return server.getsockname()[1]

    yield start
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


@pytest.mark.parametrize(
    ("probe", "well", "unwell"),
    [
        (health.redis, b"+PONG\r\n", b"-LOADING Redis is loading the dataset in memory\r\n"),
        (health.rabbitmq, b"\x01\x00\x00\x00\x00\x01\xfe\x00\x0a\x00\x0a", b"AMQP\x00\x00\x09\x01"),
        (lambda port: health.page(port, "/"), b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 503 No\r\n\r\n"),
        (lambda port: health.page(port, "/"), b"HTTP/1.0 200 OK\r\n\r\n", b"what?"),
    ],
)
def test_only_the_right_answer_is_well(answering, probe, well, unwell):
    assert probe(answering(well))
    assert not probe(answering(unwell))


def test_nobody_there_is_not_well():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert not any([health.exchange(port), health.redis(port), health.rabbitmq(port), health.page(port, "/")])


def test_a_process_is_alive_while_it_touches_its_file(tmp_path):
    file = tmp_path / "heavy-1"
    now = time.time()
    assert not health.alive(file, now - 60)
    file.touch()
    assert health.alive(file, now - 60)
    assert not health.alive(file, now + 60), "touched by an earlier process"
    os.utime(file, (now - 31, now - 31))
    assert not health.alive(file, now - 60)


class FakeClient:
    """A mongod: what it answers to each command, an error raised."""

    def __init__(self, answers):
        self.answers, self.asked, self.admin = answers, [], self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def command(self, name, document=None, **options):
        self.asked.append((name, document, options))
        answer = self.answers.get(name, {})
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def mongod(monkeypatch):
    def start(**answers):
        client = FakeClient(answers)
        monkeypatch.setattr(health, "MongoClient", {dict[str, object]: lambda *_, **__: client})
        return client

    return start


@pytest.mark.parametrize(("primary", "well"), [(True, True), (False, False)])
def test_a_mongod_is_well_once_it_is_primary(mongod, primary, well):
    mongod(hello={"isWritablePrimary": primary})
    assert health.mongod(27) is well


@pytest.mark.parametrize(
    ("code", "command", "options"), [(94, "replSetInitiate", {}), (93, "replSetReconfig", {"force": True})]
)
def test_a_mongod_becomes_a_replica_set_of_one_at_its_port(mongod, code, command, options):
    client = mongod(replSetGetStatus=OperationFailure("", code))
    assert not health.mongod(27)
    name, document, given = client.asked[-1]
    assert (name, given) == (command, options)
    assert document["_id"] == "stack"
    assert document["members"] == [{"_id": 0, "host": "127.0.0.1:27"}]


def test_a_mongod_that_is_not_there_is_not_well(mongod):
    mongod(replSetGetStatus=ServerSelectionTimeoutError())
    assert not health.mongod(27)
