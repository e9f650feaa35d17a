"""API keys, quotas and admission on the stack as it runs, and on replicas of it with other settings."""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
import redis

from deploy.native.ports import free_ports
from tests.integration.harness import ROOT, Stack, bearer, command, finished, new_key, paused, problem, wait_until

pytestmark = pytest.mark.integration

Headers = dict[str, str]


def key_id(key: str) -> str:
    return key.split("_")[1]


@pytest.fixture(scope="module")
def key(stack: Stack) -> str:
    return new_key(stack)


@pytest.fixture(scope="module")
def admin(stack: Stack) -> str:
    return new_key(stack, "--admin")


@pytest.fixture
def replica(stack: Stack, tmp_path: Path) -> Iterator[Callable[..., httpx.Client]]:
    """Start one more replica of the API with settings of its own; a client of it."""
    started: list[tuple[subprocess.Popen[bytes], httpx.Client]] = []

    def start(**environment: str) -> httpx.Client:
        (port,) = free_ports(1)
        with (tmp_path / f"{port}.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "uvicorn", "app.main:create_app", "--factory", "--host", "127.0.0.1"),
                    *("--port", str(port), "--http", "app.api.protocol:OneWriteProtocol", "--no-access-log"),
                ],
                cwd=ROOT,
                env={**stack.environment, **environment},
                stderr=log,
            )
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        started.append((process, client))
        wait_until(lambda: process.poll() is not None or answers(client))
        assert process.poll() is None, (tmp_path / f"{port}.log").read_text()
        return client

    yield start
    for process, client in started:
        client.close()
        process.terminate()
        process.wait(40)


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health/live").status_code == 200
    except httpx.TransportError:
        return False


def submit(client: httpx.Client, headers: Headers, data: str = "mine") -> httpx.Response:
    return client.post("/api/async/process", json={"data": data, "iterations": 5}, headers=headers)


def test_a_task_is_known_to_who_made_it_and_to_admins_alone(
    stack: Stack, api: httpx.Client, key: str, admin: str
) -> None:
    task_id = submit(api, bearer(key)).json()["task_id"]
    path = f"/api/async/tasks/{task_id}"
    for headers in ({}, bearer(new_key(stack))):
        problem(api.get(path, headers=headers), 404, "not-found")
        problem(api.delete(path, headers=headers), 404, "not-found")
    for owner in (key, admin):
        assert api.get(path, headers=bearer(owner)).status_code == 200
    wait_until(lambda: api.get(path, headers=bearer(key)).json()["status"] == "SUCCESS")
    assert "owner" not in api.get(path, headers=bearer(admin)).json()


def test_an_archived_task_is_still_its_owners(stack: Stack, api: httpx.Client, key: str) -> None:
    task_id = submit(api, bearer(key)).json()["task_id"]
    path = f"/api/async/status/{task_id}"
    with redis.Redis.from_url(stack.settings.redis_url.get_secret_value()) as records:
        wait_until(lambda: records.ttl(f"task:{task_id}") > 0)  # the archive has it
        records.delete(f"task:{task_id}")
    problem(api.get(path), 404, "not-found")
    assert api.get(path, headers=bearer(key)).json()["status"] == "SUCCESS"


def test_what_nobody_made_is_everybodys(api: httpx.Client, key: str) -> None:
    task_id = submit(api, {}).json()["task_id"]
    assert api.get(f"/api/async/status/{task_id}", headers=bearer(key)).status_code == 200
    finished(api, task_id)


def test_idempotency_keys_of_two_principals_do_not_meet(api: httpx.Client, key: str, admin: str) -> None:
    name = uuid4().hex
    callers = [{"Idempotency-Key": name}, bearer(key, **{"Idempotency-Key": name})]
    callers.append(bearer(admin, **{"Idempotency-Key": name}))
    first = [submit(api, headers).json()["task_id"] for headers in callers]
    again = [submit(api, headers) for headers in callers]
    assert len(set(first)) == 3
    assert [answer.json()["task_id"] for answer in again] == first
    assert {answer.headers["idempotent-replayed"] for answer in again} == {"true"}
    items = [api.post("/api/items", json={"name": "x"}, headers=headers).json()["id"] for headers in callers]
    assert len(set(items)) == 3


def test_short_idempotency_keys_are_for_those_who_share_them_with_nobody(api: httpx.Client, key: str) -> None:
    assert submit(api, bearer(key, **{"Idempotency-Key": "7"})).status_code == 202
    problem(submit(api, {"Idempotency-Key": "7"}), 422, "invalid")


@pytest.mark.parametrize("path", ["/api/items", "/api/async/process", "/api/nowhere"])
def test_a_bad_key_is_refused_although_none_is_required(api: httpx.Client, key: str, path: str) -> None:
    for wrong in ("nonsense", key[:-64] + "0" * 64, f"stack_{'0' * 24}_{'0' * 64}"):
        answer = api.get(path, headers=bearer(wrong))
        problem(answer, 401, "unauthorized")
        assert answer.headers["www-authenticate"] == 'Bearer error="invalid_token"'


def test_a_refusal_leaves_the_connection_usable_however_large_the_unread_body(
    replica: Callable[..., httpx.Client],
) -> None:
    client = replica(API_KEYS_REQUIRED="true")
    for _ in range(3):
        problem(client.post("/api/items", content=b"x" * 1_000_000), 401, "unauthorized")
        assert client.get("/health/live").status_code == 200


def test_where_keys_are_required_all_but_the_open_paths_need_one(
    replica: Callable[..., httpx.Client], key: str
) -> None:
    client = replica(API_KEYS_REQUIRED="true")
    for path in ("/", "/health", "/health/ready", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200
    answer = client.get("/api/items")
    problem(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"
    problem(submit(client, {}), 401, "unauthorized")
    assert client.get("/api/items", headers=bearer(key)).status_code == 200
    assert submit(client, bearer(key)).status_code == 202


def test_a_revoked_key_ends_within_the_time_of_the_cache(
    stack: Stack, replica: Callable[..., httpx.Client], api: httpx.Client
) -> None:
    ending = new_key(stack)
    client = replica(API_KEYS_CACHE="1")
    assert client.get("/api/items", headers=bearer(ending)).status_code == 200
    revoked = command(stack, "api-keys", "revoke", key_id(ending))
    assert revoked.returncode == 0, revoked.stderr
    time.sleep(1)
    problem(client.get("/api/items", headers=bearer(ending)), 401, "unauthorized")
    # Replicas that had not met the key know at once.
    problem(api.get("/api/items", headers=bearer(ending)), 401, "unauthorized")


def test_known_keys_pass_while_mongodb_hangs_and_unknown_ones_are_told_to_come_back(
    stack: Stack, replica: Callable[..., httpx.Client], key: str, admin: str
) -> None:
    client = replica(API_KEYS_CACHE="0.5")
    task_id = submit(client, bearer(key)).json()["task_id"]
    path = f"/api/async/status/{task_id}"
    with paused(stack, "database"):
        time.sleep(0.5)
        for _ in range(5):
            assert client.get(path, headers=bearer(key)).status_code == 200
        problem(client.get(path, headers=bearer(admin)), 503, "unavailable")
        assert submit(client, {}).status_code == 202
    wait_until(lambda: client.get(path, headers=bearer(admin)).status_code == 200)


def test_a_quota_lets_exactly_the_burst_pass_over_all_replicas(stack: Stack, api: httpx.Client) -> None:
    # One a thousand seconds: none comes back while the test runs.
    limited = new_key(stack, "--quota-rate", "0.001", "--quota-burst", "25")
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: api.get("/api/items?limit=1", headers=bearer(limited)), range(60)))
    assert Counter(answer.status_code for answer in answers) == {200: 25, 429: 35}
    passed = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.headers["ratelimit-policy"] for answer in answers} == {'"default";q=25;w=25000'}
    left = sorted(int(answer.headers["ratelimit"].split(";")[1].removeprefix("r=")) for answer in passed)
    assert left == list(range(25))
    for answer in refused:
        problem(answer, 429, "quota-exceeded")
        assert answer.headers["ratelimit"].startswith('"default";r=0;t=')
        assert int(answer.headers["retry-after"]) >= int(answer.headers["ratelimit"].rpartition("=")[2])
    assert api.get("/api/items", headers={}).status_code == 200
    with redis.Redis.from_url(stack.settings.redis_url.get_secret_value()) as buckets:
        assert 0 < buckets.ttl(f"quota:{key_id(limited)}") <= 86_400


def test_a_bucket_fills_again(stack: Stack, api: httpx.Client) -> None:
    limited = new_key(stack, "--quota-rate", "5", "--quota-burst", "1")
    assert api.get("/api/items", headers=bearer(limited)).status_code == 200
    wait_until(lambda: api.get("/api/items", headers=bearer(limited)).status_code == 200)


def test_a_clock_of_redis_that_was_set_back_blocks_nobody_for_long(stack: Stack, api: httpx.Client) -> None:
    limited = new_key(stack, "--quota-rate", "5", "--quota-burst", "2")
    tomorrow = int((time.time() + 86_400) * 1_000_000)
    with redis.Redis.from_url(stack.settings.redis_url.get_secret_value()) as buckets:
        buckets.set(f"quota:{key_id(limited)}", tomorrow)
    wait_until(lambda: api.get("/api/items", headers=bearer(limited)).status_code == 200)


def test_a_full_redis_is_for_tasks_and_quotas_let_pass(stack: Stack, api: httpx.Client) -> None:
    limited = new_key(stack, "--quota-rate", "0.001", "--quota-burst", "1")
    with redis.Redis.from_url(stack.settings.redis_url.get_secret_value()) as full:
        limit = full.config_get("maxmemory")["maxmemory"]
        full.config_set("maxmemory", 1)
        try:
            answers = [api.get("/api/items", headers=bearer(limited)) for _ in range(5)]
            assert not full.exists(f"quota:{key_id(limited)}")
        finally:
            full.config_set("maxmemory", limit)
    assert {answer.status_code for answer in answers} == {200}


def test_a_quota_of_all_can_be_lifted_for_one_key(stack: Stack, replica: Callable[..., httpx.Client], key: str) -> None:
    lifted = new_key(stack, "--quota-rate", "0")
    client = replica(QUOTA_RATE="0.001", QUOTA_BURST="2")
    counts = Counter(client.get("/api/items", headers=bearer(key)).status_code for _ in range(5))
    assert counts == {200: 2, 429: 3}
    for _ in range(5):
        answer = client.get("/api/items", headers=bearer(lifted))
        assert answer.status_code == 200
        assert "ratelimit" not in answer.headers


def test_a_quota_lets_pass_while_redis_hangs_and_counts_again_after(stack: Stack, api: httpx.Client) -> None:
    limited = new_key(stack, "--quota-rate", "0.001", "--quota-burst", "3")
    assert api.get("/api/items", headers=bearer(limited)).headers["ratelimit"].startswith('"default";r=2')
    with paused(stack, "redis"), ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: api.get("/api/items", headers=bearer(limited)), range(60)))
    assert {answer.status_code for answer in answers} == {200}
    assert not [answer for answer in answers if "ratelimit" in answer.headers]
    wait_until(lambda: api.get("/api/items", headers=bearer(limited)).status_code == 429)


def admitted(client: httpx.Client) -> httpx.Response:
    """The answer to a submit that found a place, as another request may have had it for a moment."""
    while (answer := submit(client, {}, uuid4().hex)).json().get("type") == "urn:problem:overloaded":
        pass
    return answer


def test_a_full_replica_refuses_at_once_and_recovers(stack: Stack, replica: Callable[..., httpx.Client]) -> None:
    client = replica(CONCURRENCY_MAX="2")
    with ThreadPoolExecutor(2) as pool:
        with paused(stack, "rabbitmq"):
            held = [pool.submit(admitted, client) for _ in range(2)]
            refused = wait_until(lambda: (seen := client.get("/api/items")).status_code == 503 and seen)
            problem(refused, 503, "overloaded")
            assert int(refused.headers["retry-after"]) >= 1
            assert client.get("/health/live").status_code == 200
            assert client.get("/health").status_code == 200
            for task in held:
                problem(task.result(), 503, "not-published")
        assert client.get("/api/items").status_code == 200


def test_every_answer_has_the_security_fields_once(api: httpx.Client) -> None:
    wanted = {
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
    }
    answers = [
        api.get("/api/items"),  # the API's
        api.get("/docs"),
        api.get("/health"),
        api.get("/api/items", headers=bearer("wrong")),
        api.get("/metrics"),  # nginx's own
        api.request("FOO", "/"),
        api.post("/api/items", content=b"x" * 1_100_000),
        api.get("/health/nginx"),
    ]
    for answer in answers:
        for name, value in wanted.items():
            assert answer.headers.get_list(name) == [value], answer.url
        (policy,) = answer.headers.get_list("content-security-policy")
        assert "frame-ancestors 'none'" in policy
        assert len(answer.headers.get_list("x-request-id")) == 1
        assert "strict-transport-security" not in answer.headers  # this is plain HTTP


def test_the_command_makes_lists_and_revokes_keys_and_shows_none_twice(stack: Stack) -> None:
    made = command(stack, "api-keys", "create", "--name", "[red]shop", "--expires", "3", "--json")
    document = json.loads(made.stdout)
    secret = document["key"].rpartition("_")[2]
    listed = command(stack, "api-keys", "list")
    as_json = command(stack, "api-keys", "list", "--json")
    (row,) = [line for line in listed.stdout.splitlines() if document["id"] in line]
    assert "[red]shop" in row
    (row,) = [row for row in json.loads(as_json.stdout) if row["id"] == document["id"]]
    assert row["expires_at"].endswith("Z")
    assert secret not in listed.stdout + as_json.stdout
    assert "secret_hash" not in as_json.stdout
    first = json.loads(command(stack, "api-keys", "revoke", document["id"], "--json").stdout)
    again = json.loads(command(stack, "api-keys", "revoke", document["id"], "--json").stdout)
    assert first["revoked_at"] == again["revoked_at"] is not None


def test_the_command_says_in_a_line_what_went_wrong(stack: Stack) -> None:
    (nobody,) = free_ports(1)
    for words, environment, said in (
        (("revoke", "0" * 24), {}, "there is no key with the id"),
        (("list",), {"MONGODB_PORT": str(nobody), "MONGODB_TIMEOUT": "0.2"}, "MongoDB does not answer"),
        (("list",), {"MONGODB_POOL_MAX": "hunter2"}, "MONGODB_POOL_MAX"),
    ):
        done = command(stack, "api-keys", *words, **environment)
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert said in line
        assert "hunter2" not in line
    assert command(stack, "api-keys", "create").returncode == 2
    assert "Examples" in command(stack, "api-keys", "create", "--help").stdout


def test_no_key_is_in_any_log_and_its_id_is(stack: Stack, api: httpx.Client, key: str, admin: str) -> None:
    unknown = f"stack_{'1' * 24}_{uuid4().hex * 2}"
    for sent in (key, admin, unknown):
        api.get("/api/items", headers=bearer(sent))
        api.get(f"/api/items?key={sent}", headers={"X-Api-Key": sent})
        submit(api, {"Authorization": f"Basic {sent}"})
    wait_until(lambda: key_id(key) in stack.log("api-1") + stack.log("api-2"))
    files = [path for path in stack.layout.logs.rglob("*") if path.is_file()]
    assert len(files) >= 10
    logged = "".join(path.read_text(errors="replace") for path in files)
    assert '"/api/items"' in logged
    for sent in (key, admin, unknown):
        assert sent.rpartition("_")[2] not in logged


def test_no_key_is_in_a_problem(api: httpx.Client, key: str) -> None:
    wrong = key[:-64] + "0" * 64
    for path in ("/api/items", f"/api/items?key={wrong}"):
        answer = api.get(path, headers=bearer(wrong))
        assert "0" * 64 not in answer.text + str(answer.headers)


def test_the_database_keeps_no_key(stack: Stack, key: str) -> None:
    kept = stack.layout.data("mongod"), stack.layout.data("embedded")
    secret = key.rpartition("_")[2].encode()
    found = [path for folder in kept for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()]
    assert not found
