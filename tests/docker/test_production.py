"""deploy/compose.production.yml: made secrets, TLS, and what it refuses."""

import os
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.docker.harness import Stack, final_status, run, submit, wait_until

OVERLAY = "deploy/compose.production.yml"


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made") / "secrets"
    run("deploy/make-secrets.sh", str(directory))
    certificate, key = directory / "tls_certificate", directory / "tls_key"
    run(
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
        *("-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)),
    )
    key.chmod(0o644)
    return directory


@pytest.fixture(scope="module")
def stack(secrets: Path) -> Iterator[Stack]:
    running = Stack("stack-test-production", OVERLAY, SECRETS_DIR=str(secrets))
    try:
        running.up("--build")
        yield running
    finally:
        running.down()


@pytest.fixture(scope="module")
def client(stack: Stack, secrets: Path) -> Iterator[httpx.Client]:
    trust = ssl.create_default_context(cafile=str(secrets / "tls_certificate"))
    made = stack.compose("exec", "-T", "api", "python", "-m", "app", "api-keys", "create", "--admin", "--name", "test")
    headers = {"Authorization": f"Bearer {made.stdout.strip()}"}
    with httpx.Client(base_url=stack.https, verify=trust, timeout=30, headers=headers) as opened:
        yield opened


def test_secrets_are_made_once_and_kept_from_others(secrets: Path) -> None:
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    before = {path.name: path.read_text() for path in secrets.iterdir()}
    again = run("deploy/make-secrets.sh", str(secrets), check=False)
    assert again.returncode != 0
    assert "not empty" in again.stderr
    assert {path.name: path.read_text() for path in secrets.iterdir()} == before


def test_a_missing_secret_is_named(tmp_path: Path) -> None:
    stack = Stack("stack-test-missing", OVERLAY, SECRETS_DIR=str(tmp_path))
    try:
        done = stack.compose("up", "-d", "--no-deps", "redis", check=False)
        assert done.returncode != 0
        assert str(tmp_path / "redis_conf") in done.stderr
        assert not [container for container in stack.containers() if container["State"] == "running"]
    finally:
        stack.down()


def test_tasks_finish_over_tls(client: httpx.Client) -> None:
    answer = submit(client).raise_for_status()
    document = wait_until(lambda: final_status(client, answer.json()["task_id"]))
    assert document["status"] == "SUCCESS"
    assert client.post("/api/items", json={"name": "a"}).status_code == 201


def test_every_call_needs_a_key(client: httpx.Client) -> None:
    for path in ("/api/items", "/api/async/process", "/api/service1/orders", "/api/service2/x", "/api/gateway/status"):
        answer = client.get(path, headers={"Authorization": ""})
        assert answer.status_code == 401
        assert answer.json()["type"] == "urn:problem:unauthorized"
    for path in ("/health", "/api/service1/health", "/api/service2/health"):
        assert client.get(path, headers={"Authorization": ""}).status_code == 200


def test_browsers_are_told_to_stay_with_tls(client: httpx.Client, stack: Stack) -> None:
    for path in ("/api/items", "/metrics"):
        assert client.get(path).headers.get_list("Strict-Transport-Security") == ["max-age=31536000"]
    assert "Strict-Transport-Security" not in httpx.get(f"{stack.http}/").headers


def test_plain_http_leads_to_tls(client: httpx.Client, stack: Stack) -> None:
    answer = httpx.post(f"{stack.http}/api/items?a=b", json={})
    assert answer.status_code == 308
    port = stack.environment["HTTPS_PORT"]
    assert answer.headers["Location"] == f"https://127.0.0.1:{port}/api/items?a=b"
    assert len(answer.headers.get_list("X-Request-ID")) == 1
    plain_to_tls = httpx.get(str(client.base_url).replace("https:", "http:"))
    assert plain_to_tls.status_code == 400
    assert plain_to_tls.json()["type"] == "urn:problem:bad-request"


def test_only_nginx_is_published(stack: Stack) -> None:
    published = {
        (container["Service"], port["TargetPort"])
        for container in stack.containers()
        for port in container["Publishers"] or []
        if port["PublishedPort"]
    }
    assert published == {("nginx", 8080), ("nginx", 8443)}


def test_no_secret_can_be_read_by_inspecting(stack: Stack, secrets: Path) -> None:
    told = stack.inspect()
    for name in ("identity_secret", "mongodb_root_password", "redis_url", "rabbitmq_url"):
        secret = (secrets / name).read_text().strip()
        assert secret not in told, name
        assert secret.split("@")[0].split(":")[-1] not in told, name


def test_servers_ask_for_a_password(stack: Stack) -> None:
    assert "NOAUTH" in stack.compose("exec", "-T", "redis", "redis-cli", "ping").stdout
    users = stack.compose("exec", "-T", "rabbitmq", "rabbitmqctl", "-q", "list_users").stdout
    assert "stack" in users
    assert "guest" not in users
    probe = "import os, pymongo; pymongo.MongoClient('mongodb://mongodb:27017/?directConnection=true').stack.items.find_one()"
    refused = stack.compose("exec", "-T", "api", "python", "-c", probe, check=False)
    assert refused.returncode != 0
    assert "auth" in refused.stderr.lower()


def test_logs_are_bounded(stack: Stack) -> None:
    told = stack.inspect()
    assert told.count('"max-size": "10m"') == len(stack.containers())


def test_the_merged_file_is_valid_without_any_value() -> None:
    environment = {name: "" for name in os.environ if name.startswith(("NGINX_", "HTTP"))}
    run("docker", "compose", "-f", "docker-compose.yml", "-f", OVERLAY, "config", "--quiet", environment=environment)
