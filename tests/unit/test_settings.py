import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from app.settings import DEVELOPMENT_SECRET, Settings, own_urls

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / ".env.example"

Read = Callable[..., Settings]

# Values that must appear in no message.
SENTINEL = "correct-horse-battery"
STRONG = {
    "ENVIRONMENT": "production",
    "MONGODB_URL": f"mongodb://stack:{SENTINEL}-1@db-1:27017,db-2:27017/?replicaSet=rs0",
    "REDIS_URL": f"redis://:{SENTINEL}-2@cache:6379/0",
    "RABBITMQ_URL": f"amqp://stack:{SENTINEL}-3@broker//",
    "IDENTITY_SECRET": f"{SENTINEL}-4",
}
WEAK = {
    "MONGODB_URL": "mongodb://stack:{}@hidden-host/",
    "REDIS_URL": "redis://:{}@hidden-host/0",
    "RABBITMQ_URL": "amqp://stack:{}@hidden-host//",
    "IDENTITY_SECRET": "{}",
}


def refusal(read: Read, **environment: str) -> str:
    """All that a refused start can print: the message, and the traceback with its causes."""
    with pytest.raises(ValidationError) as caught:
        read(**environment)
    return repr(caught.value) + "".join(traceback.format_exception(caught.value))


def written(default: Any) -> str:
    match default:
        case None:
            return ""
        case tuple():
            return ",".join(default)
        case bool():
            return str(default).lower()
        case SecretStr():
            return default.get_secret_value()
    return str(default)


def test_lists_are_written_with_commas(read_settings: Read):
    settings = read_settings(TRUSTED_PROXIES=" 10.0.0.0/8, ::1 ,,", TASK_MODULES="app.tasks.light")
    assert settings.trusted_proxies == ("10.0.0.0/8", "::1")
    assert settings.task_modules == ("app.tasks.light",)


def test_an_empty_variable_is_none(read_settings: Read):
    settings = read_settings(MONGODB_DATABASE="", ALIVE_FILE="", TRUSTED_PROXIES="")
    assert settings.mongodb_database == "stack"
    assert settings.alive_file is None
    assert settings.trusted_proxies == ("127.0.0.1", "::1")


def test_addresses_that_nobody_gave_follow_the_ports_of_the_native_stack(read_settings: Read):
    settings = read_settings(MONGODB_PORT="7001", REDIS_PORT="7002", RABBITMQ_PORT="7003")
    assert settings.mongodb_url.get_secret_value() == "mongodb://127.0.0.1:7001/?directConnection=true"
    assert settings.redis_url.get_secret_value() == "redis://127.0.0.1:7002/0"
    assert settings.rabbitmq_url.get_secret_value() == "amqp://guest:guest@127.0.0.1:7003//"


def test_the_addresses_in_the_source_are_those_at_the_default_ports(settings: Settings):
    for name, url in own_urls(settings).items():
        assert Settings.model_fields[name].default.get_secret_value() == url


def test_an_address_that_was_given_stays_whatever_the_ports(read_settings: Read):
    given = {"MONGODB_URL": "mongodb://127.0.0.1:27090/?directConnection=true", "REDIS_URL": "redis://cache:6379/0"}
    settings = read_settings(**given, MONGODB_PORT="7001", REDIS_PORT="7002")
    assert settings.mongodb_url.get_secret_value() == given["MONGODB_URL"]
    assert settings.redis_url.get_secret_value() == given["REDIS_URL"]


def test_development_starts_on_its_defaults(settings: Settings):
    assert settings.environment == "development"
    assert settings.identity_secret.get_secret_value() == DEVELOPMENT_SECRET


def test_production_refuses_all_defaults_and_names_each(read_settings: Read):
    message = refusal(read_settings, ENVIRONMENT="production")
    assert "MONGODB_URL, REDIS_URL, RABBITMQ_URL, IDENTITY_SECRET:" in message
    assert DEVELOPMENT_SECRET not in message
    assert "127.0.0.1" not in message


@pytest.mark.parametrize(
    "password", ["", "guest", "password", "changeme", "admin", "root", "secret", "development-only-not-a-secret"]
)
@pytest.mark.parametrize("name", WEAK)
def test_production_refuses_each_default_password_without_printing_a_value(
    read_settings: Read, name: str, password: str
):
    # An empty variable would be none, and the default in its place is refused as well.
    message = refusal(read_settings, **{**STRONG, name: WEAK[name].format(password)})
    assert f"  Value error, {name}: a default or empty password" in message
    assert not [other for other in WEAK if other != name and other in message]
    assert SENTINEL not in message
    assert "hidden-host" not in message
    assert DEVELOPMENT_SECRET not in message


@pytest.mark.parametrize("name", ["MONGODB_URL", "REDIS_URL", "RABBITMQ_URL"])
def test_production_refuses_a_url_without_a_password(read_settings: Read, name: str):
    message = refusal(read_settings, **{**STRONG, name: "scheme://hidden-host/"})
    assert f"{name}:" in message
    assert "hidden-host" not in message


def test_production_starts_on_passwords_of_its_own_and_shows_none(read_settings: Read):
    settings = read_settings(**STRONG)
    assert settings.redis_url.get_secret_value() == STRONG["REDIS_URL"]
    assert SENTINEL not in repr(settings) + str(settings) + settings.model_dump_json()


def test_a_value_that_cannot_be_is_named_and_not_printed(read_settings: Read):
    message = refusal(read_settings, REDIS_POOL_MAX=SENTINEL, LOG_LEVEL=SENTINEL, MONGODB_TIMEOUT="-765.25")
    assert "redis_pool_max" in message
    assert "log_level" in message
    assert "mongodb_timeout" in message
    assert SENTINEL not in message
    assert "765.25" not in message


def test_secrets_are_read_from_files(read_settings: Read, tmp_path: Path):
    for name in WEAK:
        (tmp_path / name.lower()).write_text(STRONG[name] + "\n")
    # docker-compose.yml sets the URLs; an empty variable over them lets the files through.
    settings = read_settings(secrets_dir=tmp_path, ENVIRONMENT="production", MONGODB_URL="")
    assert settings.mongodb_url.get_secret_value() == STRONG["MONGODB_URL"]
    assert settings.identity_secret.get_secret_value() == STRONG["IDENTITY_SECRET"]


def test_the_environment_wins_over_files(read_settings: Read, tmp_path: Path):
    (tmp_path / "mongodb_database").write_text("of_the_secret")
    (tmp_path / ".env").write_text("MONGODB_DATABASE=of_the_file\nLOG_LEVEL=ERROR\n")
    settings = read_settings(env_file=tmp_path / ".env", secrets_dir=tmp_path, MONGODB_DATABASE="of_the_environment")
    assert settings.mongodb_database == "of_the_environment"
    assert settings.log_level == "ERROR"


def test_settings_do_not_change(settings: Settings):
    with pytest.raises(ValidationError, match="frozen"):
        settings.redis_pool_max = 1


def test_a_service_remembers_an_event_for_longer_than_its_letter_can_be_replayed(read_settings: Read):
    text = refusal(read_settings, EVENT_MARKER_DAYS="7", DEAD_LETTER_RETENTION_DAYS="7")
    assert "EVENT_MARKER_DAYS has to be more" in text
    read_settings(EVENT_MARKER_DAYS="8", DEAD_LETTER_RETENTION_DAYS="7")


def example_lines() -> list[str]:
    """The lines of what Settings reads; those that only the compose files read come after."""
    lines = EXAMPLE.read_text().splitlines()
    return lines[: lines.index("# Docker alone (docker-compose.yml)")]


def variable(line: str) -> str:
    """The variable a line sets when its mark is taken away; nothing for a comment, which has a space after its mark."""
    return line.removeprefix("#") if re.match(r"#[A-Z]", line) else ""


def test_example_lists_every_setting_in_order_with_its_default():
    assert list(filter(None, map(variable, example_lines()))) == [
        f"{name.upper()}={written(field.default)}" for name, field in Settings.model_fields.items()
    ]


def test_example_says_of_each_setting_why_it_exists():
    lines = example_lines()
    for before, line in zip(["", *lines], lines, strict=False):
        if variable(line):
            assert before.startswith("# "), line
    comments = [line for line in lines if line.startswith("# ")]
    assert len(comments) == len(set(comments))


def test_example_has_the_groups_of_the_source():
    source = (ROOT / "app" / "settings.py").read_text().splitlines()
    wanted, group = [], ""
    for line in source[source.index("class Settings(BaseSettings):") :]:
        name = line.strip().split(":")[0]
        if line.startswith("    # "):
            group = line.strip()
        elif line.startswith("    ") and name in Settings.model_fields:
            wanted.append((group, name.upper()))
    found, group = [], ""
    lines = example_lines()
    for number, line in enumerate(lines):
        if line.startswith("# ") and not lines[number + 1]:
            group = line
        elif variable(line):
            found.append((group, variable(line).split("=")[0]))
    assert found == wanted


def test_example_lists_what_only_the_compose_files_read():
    compose = [ROOT / "docker-compose.yml", ROOT / "deploy" / "compose.production.yml"]
    read = {name for file in compose for name in re.findall(r"\$\{([A-Z_]+):-", file.read_text())}
    listed = {variable(line).split("=")[0] for line in EXAMPLE.read_text().splitlines() if variable(line)}
    own = {name.upper() for name in Settings.model_fields}
    assert listed - own == read - own


def test_a_copy_of_the_example_sets_nothing(read_settings: Read):
    # Not even to the default: a MONGODB_URL that is set is one that the native stack uses instead of its own.
    assert not read_settings(env_file=EXAMPLE).model_fields_set


def test_the_example_with_its_marks_taken_away_changes_nothing(read_settings: Read, settings: Settings, tmp_path: Path):
    active = tmp_path / ".env"
    active.write_text("\n".join(variable(line) for line in example_lines()))
    assert read_settings(env_file=active) == settings


@pytest.mark.parametrize("name", ["MONGODB_URL", "REDIS_URL", "RABBITMQ_URL"])
def test_a_default_password_is_refused_however_it_is_spelt(read_settings: Read, name: str):
    assert name in refusal(read_settings, **{**STRONG, name: WEAK[name].format("gu%65st")})


def test_a_url_that_is_none_is_refused_without_its_password(read_settings: Read):
    said = refusal(read_settings, **{**STRONG, "RABBITMQ_URL": f"amqp://stack:{SENTINEL}\uff0f@broker//"})
    assert "RABBITMQ_URL is no valid URL" in said
    assert SENTINEL not in said
