import subprocess
import sys
from configparser import RawConfigParser
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.native import configuration
from deploy.native.layout import Layout, StackError
from deploy.native.service import Service

VALUES = {"NAME": "value", "EMPTY": ""}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${NAME} and $NAME", "value and value"),
        ("[${EMPTY}]", "[]"),
        ("$NAMES ${NAME_2} $name ${clock}Z", "$NAMES ${NAME_2} $name ${clock}Z"),
        ("$ $1 $$NAME ~^[a-z]+$", "$ $1 $value ~^[a-z]+$"),
        ("${NAME:-other} ${ NAME }", "${NAME:-other} ${ NAME }"),
    ],
)
def test_substitution_is_that_of_envsubst(text, expected):
    assert configuration.envsubst(text, VALUES) == expected


def test_a_value_is_not_substituted_again():
    assert configuration.envsubst("${A}", {"A": "${B}", "B": "no"}) == "${B}"


def test_a_template_that_nothing_fills_is_named(tmp_path):
    template = tmp_path / "some.conf.template"
    template.write_text("listen ${NGINX_LISTEN};")
    with pytest.raises(StackError, match=r"some\.conf\.template.*\$\{NGINX_LISTEN\}"):
        configuration.render(template, {})


@pytest.fixture
def service(tmp_path):
    return Service(
        name="api-1",
        stage=2,
        command=(sys.executable, "-c", "import os; print(os.getcwd(), os.environ['SECRET'], sep='|')"),
        environment={"SECRET": """it's a "b" $HOME `id` % ;# \\""", "PATH": "/usr/bin:/bin"},
        directory=tmp_path,
        is_well=lambda _: True,
        stop_seconds=30,
    )


def test_the_script_hands_on_any_value_and_place(service, tmp_path):
    place = tmp_path / "a place; 100% $new"
    place.mkdir()
    path = tmp_path / "script"
    path.write_text(configuration.script(replace(service, directory=place), sys.executable))
    done = subprocess.run(["/bin/sh", path], capture_output=True, text=True, check=True, env={})
    assert done.stdout.strip() == f"{place}|{service.environment['SECRET']}"


def test_supervisord_runs_one_program_a_process(service, tmp_path):
    layout = Layout(tmp_path / "100% of it")
    text = configuration.supervisord_conf(layout, [service, replace(service, name="api-2")], sys.executable)
    parser = RawConfigParser()
    parser.read_string(text)
    assert {"program:api-1", "program:api-2"} <= set(parser.sections())
    program = parser["program:api-1"]
    assert (program["autorestart"], program["stopwaitsecs"], program["stopsignal"]) == ("true", "30", "TERM")
    assert "100%% of it" in program["command"]
    assert "inet_http_server" not in parser.sections()
    assert parser["unix_http_server"]["chmod"] == "0700"


@pytest.mark.parametrize("change", [{"command": ("other",)}, {"digest": "other"}, {"environment": {"A": "b"}}])
def test_what_changes_a_process_changes_its_fingerprint(service, change):
    before = configuration.fingerprint(service, sys.executable)
    assert configuration.fingerprint(service, sys.executable) == before
    assert configuration.fingerprint(replace(service, **change), sys.executable) != before


def test_a_file_changes_the_fingerprint_unless_it_is_read_again(service):
    other = {"files": {Path("some.conf"): "changed"}}
    before = configuration.fingerprint(service, sys.executable)
    assert configuration.fingerprint(replace(service, **other), sys.executable) != before
    assert configuration.fingerprint(replace(service, **other, rereads=True), sys.executable) == before
