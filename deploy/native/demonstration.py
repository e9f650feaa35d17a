"""Give the running stack one heavy task, as a client does, and show it to its end."""

import http.client
import json
import time
from contextlib import closing
from typing import Any

from deploy.native.health import HOST
from deploy.native.layout import StackError
from deploy.native.output import Output

TASK = {"data": "The quick brown fox jumps over the lazy dog", "iterations": 2000}
PATIENCE_SECONDS = 120
POLL_SECONDS = 0.2
FINAL = frozenset({"SUCCESS", "FAILURE", "CANCELLED"})
SHOWN_ITEMS = 3


def demonstrate(port: int, output: Output) -> None:
    """Submit a task, show its progress and its result. Raises StackError if it does not succeed."""
    output.say()
    output.say(f"One heavy task: POST http://{HOST}:{port}/api/async/process")
    submitted = ask(port, "POST", "/api/async/process", TASK)
    with output.bar("task") as bar:
        document = follow(port, submitted["task_id"], bar.show)
    if document["status"] != "SUCCESS":
        raise StackError(f"the example task ended as {document['status']}: {document.get('error')}")
    output.say(f"  result {json.dumps(shortened(document['result']))}")


def shortened(result: object) -> object:
    """Return a result with the length of each long list in its place."""
    if isinstance(result, dict):
        return {key: shortened(value) for key, value in result.items()}
    return f"[{len(result)} items]" if isinstance(result, list) and len(result) > SHOWN_ITEMS else result


def follow(port: int, task_id: str, show: Any) -> dict[str, Any]:
    """Ask for a task's status until it is final, and return that. Raises StackError if it takes too long."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        document = ask(port, "GET", f"/api/async/status/{task_id}")
        progress = document.get("progress") or {}
        final = document["status"] in FINAL
        show(1.0 if document["status"] == "SUCCESS" else progress.get("current", 0) / (progress.get("total") or 1))
        if final:
            return document
        time.sleep(POLL_SECONDS)
    raise StackError(
        f"the example task {task_id} was not done after {PATIENCE_SECONDS} s: `make logs s=heavy` says why"
    )


def ask(port: int, method: str, path: str, body: object = None) -> dict[str, Any]:
    """Make one call and return its JSON. Raises StackError for any other answer than a success."""
    headers = {"Content-Type": "application/json"} if body is not None else {}
    try:
        with closing(http.client.HTTPConnection(HOST, port, timeout=15)) as connection:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read()
        if not http.client.OK <= response.status < http.client.MULTIPLE_CHOICES:
            raise StackError(f"{method} {path} answered {response.status}: {text[:300].decode(errors='replace')}")
        return dict(json.loads(text))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise StackError(f"{method} {path} failed: {error}") from error
