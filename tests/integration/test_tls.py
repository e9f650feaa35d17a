"""deploy/nginx-tls.conf.template, which the production overlay adds, with the real nginx before the running stack."""

import os
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from deploy.native.configuration import render
from deploy.native.ports import free_ports
from deploy.native.servers import find_tools
from tests.integration.harness import ROOT, Stack, finished, problem, submit, wait_until

pytestmark = pytest.mark.integration

HSTS = "strict-transport-security"


class Edge(NamedTuple):
    """An nginx that speaks TLS on one port and sends plain HTTP there from another."""

    tls: int
    plain: int
    certificate: Path

    def client(self, **versions: ssl.TLSVersion) -> httpx.Client:
        trust = ssl.create_default_context(cafile=self.certificate)
        for name, version in versions.items():
            setattr(trust, name, version)
        return httpx.Client(base_url=f"https://localhost:{self.tls}", verify=trust, timeout=30)


@pytest.fixture(scope="module")
def edge(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    prefix = tmp_path_factory.mktemp("tls") / "nginx"
    # What the running nginx has, and the snippet beside it: its places and ports are the containers'.
    shutil.copytree(stack.layout.root / "nginx", prefix, ignore=shutil.ignore_patterns("temp", "nginx.pid"))
    tls, plain = free_ports(2)
    certificate, key = prefix / "tls_certificate", prefix / "tls_key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    server = prefix / "conf.d" / "default.conf"
    listen = f"127.0.0.1:{stack.url.rpartition(':')[2]}"
    server.write_text(replaced(server.read_text(), {f"listen {listen} ": f"listen 127.0.0.1:{tls} ssl "}))
    snippet = render(ROOT / "deploy" / "nginx-tls.conf.template", {"NGINX_HTTPS_PORT": str(tls)})
    places = {
        "/run/secrets/tls_certificate": str(certificate),
        "/run/secrets/tls_key": str(key),
        "listen 8080 ": f"listen 127.0.0.1:{plain} ",
    }
    tools = find_tools()
    version = subprocess.run([tools.nginx, "-v"], capture_output=True, text=True, check=True).stderr.rpartition("/")[2]
    if tuple(map(int, version.split(" ")[0].strip().split("."))) < (1, 25, 1):
        places["http2 on;"] = ""  # such an old one does not know the directive
    (prefix / "conf.d" / "tls.conf").write_text(replaced(snippet, places))
    (prefix / "temp").mkdir(exist_ok=True)
    user = " user root;" if os.geteuid() == 0 else ""
    command = [tools.nginx, "-e", "stderr", "-p", f"{prefix}/", "-c", "nginx.conf", "-g", f"daemon off;{user}"]
    with (prefix / "log").open("wb") as log:
        process = subprocess.Popen([*command], stdout=log, stderr=log, env={"TZ": "UTC"})
    try:
        edge = Edge(tls, plain, certificate)
        wait_until(lambda: process.poll() is not None or listens(plain), 10)
        assert process.poll() is None, (prefix / "log").read_text()
        yield edge
    finally:
        process.terminate()
        process.wait(20)


def replaced(text: str, values: dict[str, str]) -> str:
    """`text` with each of `values` put in, which must be there."""
    for old, new in values.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def listens(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health/nginx").status_code == 204
    except httpx.TransportError:
        return False


def test_tasks_finish_over_tls(edge: Edge) -> None:
    with edge.client() as client:
        assert finished(client, submit(client))["status"] == "SUCCESS"


def test_browsers_are_told_to_stay_with_tls_on_every_answer(edge: Edge) -> None:
    with edge.client() as client:
        for path, status in (("/api/items", 200), ("/docs", 200), ("/api/nowhere", 404), ("/metrics", 404)):
            answer = client.get(path)
            assert answer.status_code == status
            assert answer.headers.get_list(HSTS) == ["max-age=31536000"]
            assert answer.headers.get_list("x-content-type-options") == ["nosniff"]


def test_plain_http_leads_to_tls_and_says_nothing_of_it(edge: Edge) -> None:
    answer = httpx.post(f"http://localhost:{edge.plain}/api/items?a=b", json={})
    assert answer.status_code == 308
    assert answer.headers["location"] == f"https://localhost:{edge.tls}/api/items?a=b"
    assert HSTS not in answer.headers  # RFC 6797, section 7.2
    assert answer.headers["x-frame-options"] == "DENY"


def test_plain_http_to_the_tls_port_is_a_problem(edge: Edge) -> None:
    problem(httpx.get(f"http://localhost:{edge.tls}/api/items"), 400, "bad-request")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_the_versions_of_today_are_spoken(edge: Edge, version: ssl.TLSVersion) -> None:
    with edge.client(minimum_version=version, maximum_version=version) as client:
        assert client.get("/health").status_code == 200


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_older_versions_are_refused(edge: Edge) -> None:
    trust = ssl.create_default_context(cafile=edge.certificate)
    trust.set_ciphers("ALL:@SECLEVEL=0")  # or this side would refuse by itself
    trust.minimum_version = trust.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        httpx.Client(base_url=f"https://localhost:{edge.tls}", verify=trust) as client,
        pytest.raises(httpx.ConnectError, match=r"(?i)alert|protocol"),
    ):
        client.get("/health")
