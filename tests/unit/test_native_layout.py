import pytest

from app.settings import Settings
from deploy.native.layout import ROOT, Layout, StackError, State, as_environment, private_directory


def test_a_relative_directory_is_one_in_the_checkout():
    assert Layout.of(Settings(stack_dir=".stack")).root == ROOT / ".stack"


def test_the_socket_fits_however_deep_the_directory(tmp_path):
    short, deep = Layout(tmp_path / "s"), Layout(tmp_path / ("deep" * 30))
    assert short.socket.parent == short.root
    assert len(str(deep.socket)) < 95
    assert deep.socket != Layout(tmp_path / ("deep" * 31)).socket


def test_everything_is_this_users_alone(tmp_path):
    layout = Layout(tmp_path / "stack")
    layout.prepare()
    State({"A": "b"}, {}).save(layout)
    assert layout.root.stat().st_mode & 0o777 == 0o700
    assert layout.state.stat().st_mode & 0o777 == 0o600


def test_a_directory_with_other_files_is_neither_used_nor_removed(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    layout = Layout(tmp_path)
    with pytest.raises(StackError, match="other files"):
        layout.prepare()
    with pytest.raises(StackError, match="not made by"):
        layout.remove()
    assert (tmp_path / "thesis.tex").exists()


def test_its_own_directory_is_used_again_and_removed(tmp_path):
    layout = Layout(tmp_path / "stack")
    layout.prepare()
    layout.prepare()
    layout.remove()
    assert not layout.root.exists()


def test_a_directory_others_may_enter_is_refused(tmp_path):
    path = tmp_path / "shared"
    path.mkdir(mode=0o755)
    with pytest.raises(StackError, match="private"):
        private_directory(path)


def test_settings_survive_being_written(tmp_path):
    settings = Settings(
        nginx_port=8099, trusted_proxies=("10.0.0.1", "::1"), mongodb_url="mongodb://u:p@h/?a=b", publish_timeout=1.5
    )
    layout = Layout(tmp_path)
    State(as_environment(settings), {"app": "1"}, {"api": 4}).save(layout)
    state = State.load(layout)
    assert state is not None
    assert state.restored() == settings
    assert state.scaled == {"api": 4}


def test_what_cannot_be_read_is_no_state(tmp_path):
    layout = Layout(tmp_path)
    assert State.load(layout) is None
    layout.state.write_text("{")
    assert State.load(layout) is None


def test_settings_of_now_do_not_leak_into_those_of_the_stack(monkeypatch):
    state = State(as_environment(Settings(nginx_port=8099)), {})
    monkeypatch.setenv("NGINX_PORT", "9999")
    assert state.restored().nginx_port == 8099
