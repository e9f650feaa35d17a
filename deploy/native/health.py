"""Is it well? One cheap probe a kind of process; each answers within half a second."""

import http.client
import socket
import time
from contextlib import closing
from pathlib import Path

from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

HOST = "127.0.0.1"
TIMEOUT = 2.5  # above HEALTH_TIMEOUT: a replica that says which server hangs is well
ALIVE_SECONDS = 30  # workers and beat touch their file every 5
NOT_INITIATED, NOT_A_MEMBER = 94, 93  # mongod's error codes of a replica set


def exchange(port: int, question: bytes = b"", expected: bytes = b"") -> bool:
    """Tell whether a server accepts a connection and answers the question with the expected beginning."""
    try:
        with socket.create_connection((HOST, port), TIMEOUT) as connection:
            connection.sendall(question)
            return connection.recv(16).startswith(expected) if expected else True
    except OSError:
        return False


def redis(port: int) -> bool:
    """Tell whether Redis answers and has read its data."""
    return exchange(port, b"PING\r\n", b"+PONG")


def rabbitmq(port: int) -> bool:
    """Tell whether the broker offers a connection: a frame of type 1 is connection.start."""
    return exchange(port, b"AMQP\x00\x00\x09\x01", b"\x01")


def page(port: int, path: str) -> bool:
    """Tell whether a path answers 200."""
    with closing(http.client.HTTPConnection(HOST, port, timeout=TIMEOUT)) as connection:
        try:
            connection.request("GET", path)
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False


def alive(file: Path, started: float) -> bool:
    """Tell whether the process, started then, touched its file lately."""
    try:
        touched = file.stat().st_mtime
    except OSError:
        return False
    return touched >= int(started) and time.time() - touched < ALIVE_SECONDS


def mongodb(url: str, seconds: float = TIMEOUT) -> bool:
    """Tell whether a MongoDB answers."""
    wait = int(seconds * 1000)
    try:
        with MongoClient[dict[str, object]](url, serverSelectionTimeoutMS=wait, connectTimeoutMS=wait) as client:
            client.admin.command("ping")
    except PyMongoError:
        return False
    return True


def mongod(port: int) -> bool:
    """Tell whether our own mongod is the primary of its replica set of one (transactions need one); make it one."""
    wait = int(TIMEOUT * 1000)
    url = f"mongodb://{HOST}:{port}/?directConnection=true"
    members = {"_id": "stack", "members": [{"_id": 0, "host": f"{HOST}:{port}"}]}
    try:
        with MongoClient[dict[str, object]](url, serverSelectionTimeoutMS=wait, connectTimeoutMS=wait) as client:
            try:
                client.admin.command("replSetGetStatus")
            except OperationFailure as error:
                if error.code == NOT_INITIATED:
                    client.admin.command("replSetInitiate", members)
                elif error.code == NOT_A_MEMBER:  # MONGODB_PORT has changed
                    client.admin.command("replSetReconfig", members | {"version": int(time.time())}, force=True)
                return False
            return bool(client.admin.command("hello").get("isWritablePrimary"))
    except PyMongoError:
        return False
