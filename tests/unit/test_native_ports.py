import os
import socket

import pytest

from deploy.native import ports
from deploy.native.layout import StackError
from deploy.native.service import Service


def service(tmp_path, **named):
    return Service("nginx", 0, (), {}, tmp_path, lambda _: True, ports=named)


@pytest.fixture
def taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_free_ports_are_free_and_different():
    found = ports.free_ports(20)
    assert len(set(found)) == 20
    assert not any(map(ports.why_not, found))


def test_free_ports_pass(tmp_path):
    first, second = ports.free_ports(2)
    ports.check([service(tmp_path, NGINX_PORT=first, API_PORT=second)], ours=())


def test_a_taken_port_is_explained(tmp_path, taken):
    with pytest.raises(StackError) as error:
        ports.check([service(tmp_path, NGINX_PORT=taken)], ours=())
    line = str(error.value)
    assert line.startswith(f"port {taken} of nginx is taken by ")
    assert f"(process {os.getpid()})" in line
    other = int(line.rpartition("NGINX_PORT=")[2].removesuffix(" make run"))
    assert not ports.why_not(other)


def test_a_port_of_all_addresses_is_taken_too(tmp_path):
    with socket.create_server(("0.0.0.0", 0)) as server, pytest.raises(StackError, match="is taken"):
        ports.check([service(tmp_path, NGINX_PORT=server.getsockname()[1])], ours=())


def test_a_port_of_ones_own_is_no_obstacle(tmp_path, taken):
    ports.check([service(tmp_path, NGINX_PORT=taken)], ours={os.getpid()})


def test_a_port_given_twice_is_explained(tmp_path):
    (port,) = ports.free_ports(1)
    with pytest.raises(StackError, match="given twice, to API_PORT and to NGINX_PORT"):
        ports.check([service(tmp_path, API_PORT=port, NGINX_PORT=port)], ours=())


def test_a_process_of_another_user_cannot_be_named(tmp_path, taken, monkeypatch):
    monkeypatch.setattr(ports, "listeners", dict)
    with pytest.raises(StackError, match="another user's process"):
        ports.check([service(tmp_path, NGINX_PORT=taken)], ours=())


def test_a_port_only_root_may_have_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(ports, "why_not", {80: 13}.get)
    with pytest.raises(StackError, match="port 80 of nginx needs root"):
        ports.check([service(tmp_path, NGINX_PORT=80)], ours=())
