from types import SimpleNamespace

import pytest

from app.engine.reconciler import LOOK_MAX, Reconciler, _suspect


@pytest.mark.parametrize(
    ("record", "ready", "suspect"),
    [
        ({"status": "PENDING", "lease": "1"}, 9, True),  # its lease is over, or it would not be due
        ({"status": "PENDING"}, 9, False),
        ({"status": "PENDING"}, 0, True),
        ({"status": "RETRY"}, 9, False),
        ({"status": "RETRY"}, 0, True),
        ({"status": "STARTED"}, 9, True),
        ({"status": "PROGRESS"}, 9, True),
        ({"status": "PENDING", "lost": "1"}, 9, True),
    ],
)
def test_what_is_suspect_when_it_is_due(record: dict[str, str], ready: int, suspect: bool):
    assert _suspect({**record, "queue": "light"}, {"light": ready}) is suspect


def test_each_look_takes_twice_as_long_as_the_one_before_up_to_an_hour():
    settings = SimpleNamespace(reconcile_after=30.0, reconcile_interval=5.0, reconcile_batch=1, recovery_time=720)
    reconciler = Reconciler(None, None, None, settings, lease=11)
    assert [reconciler._again_in(looks) for looks in range(4)] == [30, 60, 120, 240]  # noqa: SLF001
    assert reconciler._again_in(10**6) == LOOK_MAX  # noqa: SLF001
