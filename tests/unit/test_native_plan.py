import sys
from collections import Counter
from pathlib import Path

import pytest

from app.settings import Settings
from deploy.native.layout import Layout, StackError, State, as_environment
from deploy.native.plan import Plan, has_own_database
from deploy.native.servers import Tools, find_tools
from deploy.native.service import digest_of

TOOLS = Tools(
    "/usr/sbin/nginx", "/usr/bin/redis-server", "/usr/lib/rabbitmq/bin/rabbitmq-server", "/usr/bin/epmd", None
)


@pytest.fixture(autouse=True)
def nothing_else_is_set(clean_environment):
    """No variable of the shell that runs the tests counts."""


def services(tmp_path, scaled=None, tools=TOOLS, **settings):
    settings = Settings(_env_file=None, **{"api_replicas": 2, "heavy_workers": 1, **settings})
    plan = Plan(settings, Layout(tmp_path), tools, {"app": "a", "database": "d"}, scaled or {})
    return {service.name: service for service in plan.services()}


def test_every_process_is_planned_servers_first(tmp_path):
    planned = services(tmp_path)
    assert " ".join(planned) == (
        "epmd redis rabbitmq database api-1 api-2 heavy-1 light-1 beat events-1 outside service1 service2 nginx"
    )
    stages = [service.stage for service in planned.values()]
    assert stages == sorted(stages)


def test_scaling_wins_over_the_settings_and_changes_no_other_process(tmp_path):
    before, after = services(tmp_path), services(tmp_path, {"api": 3, "worker": 2})
    assert set(after) - set(before) == {"api-3", "heavy-2"}
    assert all(after[name].environment == one.environment for name, one in before.items())
    assert all(after[name].command == one.command for name, one in before.items())


def test_a_further_beat_is_a_process_of_its_own(tmp_path):
    planned = services(tmp_path, {"beat": 2})
    assert planned["beat-2"].command == planned["beat"].command
    assert planned["beat-2"].kind == planned["beat"].kind == "beat"
    assert planned["beat-2"].environment["ALIVE_FILE"] == str(tmp_path / "alive" / "beat-2")


def test_nginx_knows_every_replica_and_listens_here_only(tmp_path):
    nginx = services(tmp_path, {"api": 3}, api_port=9001, nginx_port=9000)["nginx"]
    text = "\n".join(nginx.files.values())
    assert all(f"server 127.0.0.1:{port} max_fails=0;" in text for port in (9001, 9002, 9003))
    assert "listen 127.0.0.1:9000 " in text
    assert "9004" not in text


def test_the_services_are_run_like_the_api_and_nginx_finds_them(tmp_path):
    planned = services(tmp_path, service1_port=9101, service2_port=9102, outside_port=9103, gateway_timeout=7)
    for name, port in (("service1", 9101), ("service2", 9102), ("outside", 9103)):
        service = planned[name]
        assert service.command[3] == f"app.backends.{name}:create_app"
        # All but the module and the port is the API's.
        assert service.command[4:8] == planned["api-1"].command[4:8]
        assert service.command[8] == str(port)
        assert service.command[9:] == planned["api-1"].command[9:]
        assert service.stop_seconds == planned["api-1"].stop_seconds
    text = "\n".join(planned["nginx"].files.values())
    assert "server 127.0.0.1:9101 max_fails=0;" in text
    assert "server 127.0.0.1:9102 max_fails=0;" in text
    assert "9103" not in text
    assert "proxy_read_timeout 7s;" in text
    assert "within 7 s" in text
    api = planned["api-1"].environment
    assert (api["SERVICE1_URL"], api["SERVICE2_URL"]) == ("http://127.0.0.1:9101", "http://127.0.0.1:9102")


def test_only_nginx_is_told_of_the_gateways_time_out(tmp_path):
    before, after = services(tmp_path), services(tmp_path, gateway_timeout=7)
    changed = {
        name
        for name, one in after.items()
        if (one.environment, one.files) != (before[name].environment, before[name].files)
    }
    assert changed == {"nginx"}


def test_no_two_processes_share_a_port_and_each_port_has_its_setting(tmp_path):
    planned = services(tmp_path)
    ports = Counter(port for service in planned.values() for port in service.ports.values())
    assert max(ports.values()) == 1
    names = {name for service in planned.values() for name in service.ports}
    assert {name.lower() for name in names} <= set(Settings.model_fields)
    assert {name for name in Settings.model_fields if name.endswith("_port")} == {name.lower() for name in names}


def test_processes_are_told_where_the_servers_are(tmp_path):
    environment = services(tmp_path, redis_port=7001, rabbitmq_port=7002, mongodb_port=7003)["heavy-1"].environment
    assert environment["REDIS_URL"] == "redis://127.0.0.1:7001/0"
    assert environment["RABBITMQ_URL"] == "amqp://guest:guest@127.0.0.1:7002//"
    assert environment["MONGODB_URL"].startswith("mongodb://127.0.0.1:7003/")
    assert environment["REMAP_SIGTERM"] == "SIGQUIT"
    assert environment["ALIVE_FILE"] == str(tmp_path / "alive" / "heavy-1")


def test_a_setting_of_the_application_reaches_it_and_one_of_the_stack_does_not_restart_it(tmp_path):
    api = services(tmp_path)["api-1"].environment
    assert services(tmp_path, log_level="DEBUG")["api-1"].environment == {**api, "LOG_LEVEL": "DEBUG"}
    assert services(tmp_path, nginx_port=9000, heavy_workers=3, nginx_rate=7)["api-1"].environment == api


def test_a_database_of_the_users_is_used_as_it_is(tmp_path):
    url = "mongodb://user:word@db.example/?tls=true"
    planned = services(tmp_path, mongodb_url=url)
    assert "database" not in planned
    assert planned["api-1"].environment["MONGODB_URL"] == url


def test_what_a_running_stack_remembers_still_names_its_own_database():
    first = Settings(_env_file=None, mongodb_port=7003)
    remembered = State(as_environment(first), {}).restored()
    assert has_own_database(remembered)
    assert remembered == first


def test_mongod_is_preferred_and_has_transactions(tmp_path):
    tools = Tools(TOOLS.nginx, TOOLS.redis, TOOLS.rabbitmq, TOOLS.epmd, "/opt/bin/mongod")
    command = services(tmp_path, tools=tools)["database"].command
    assert command[0] == "/opt/bin/mongod"
    assert "--replSet" in command
    assert services(tmp_path)["database"].command[0] == sys.executable


def test_missing_programs_are_all_named(tmp_path):
    for name in ("nginx", "epmd"):
        (tmp_path / name).touch(mode=0o755)
    with pytest.raises(StackError, match="redis-server, rabbitmq-server not found: `make setup`"):
        find_tools(str(tmp_path))


def test_a_digest_follows_the_code():
    assert digest_of("app") == digest_of("app")
    assert digest_of("app") != digest_of("app", "requirements.txt")


def test_the_path_does_not_depend_on_the_terminal(monkeypatch):
    before = TOOLS.path
    monkeypatch.setenv("PATH", "/somewhere/else")
    assert TOOLS.path == before
    assert str(Path(sys.executable).parent) in before
