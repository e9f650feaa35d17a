"""Which workflows are looked at, and that one which cannot be keeps back no other."""

from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from app.engine.conductor import Conductor
from app.settings import Settings


class Workflows:
    """The repository, as far as a round touches it."""

    def __init__(self, due: list[str]) -> None:
        self.waiting = due
        self.postponed: list[str] = []

    async def due(self, limit: int) -> list[str]:
        return self.waiting[:limit]

    async def postpone(self, workflow_id: str, *, look_in: float) -> None:
        assert look_in
        self.postponed.append(workflow_id)


class Looking(Conductor):
    """Looks at nothing, and says at what it would have."""

    def __init__(self, settings: Settings, due: list[str]) -> None:
        self.repository = Workflows(due)
        super().__init__(self.repository, None, None, None, definitions={}, settings=settings)  # type: ignore[arg-type]
        self.looked: list[str] = []
        self.errors: dict[str, Exception] = {}

    async def advance(self, workflow_id: str) -> None:
        if workflow_id in self.errors:
            raise self.errors[workflow_id]
        self.looked.append(workflow_id)


def ended(*workflow_ids: str) -> list[dict[str, Any]]:
    # A document that an older version has archived has no workflow.
    return [{"workflow": workflow_id} for workflow_id in workflow_ids] + [{"workflow": ""}, {}]


async def test_what_is_due_and_what_a_member_of_has_ended_is_looked_at_once(settings: Settings):
    conductor = Looking(settings, ["a", "b"])
    await conductor.follow(ended("b", "c", "c"))
    assert await conductor.round() == 3
    assert sorted(conductor.looked) == ["a", "b", "c"]
    await conductor.round()
    assert sorted(conductor.looked) == ["a", "a", "b", "b", "c"]


async def test_a_round_is_bounded(settings: Settings):
    conductor = Looking(settings.model_copy(update={"workflows_batch": 3}), ["x"])
    await conductor.follow(ended(*(f"w{number}" for number in range(8))))
    assert [await conductor.round() for _ in range(4)] == [3, 3, 3, 1]
    assert len(conductor.looked) == 10


async def test_with_a_server_away_nothing_is_forgotten(settings: Settings):
    conductor = Looking(settings, [])
    conductor.errors["b"] = RedisConnectionError("away")
    await conductor.follow(ended("a", "b"))
    with pytest.raises(RedisConnectionError):
        await conductor.round()
    del conductor.errors["b"]
    assert await conductor.round() == 2
    assert "b" in conductor.looked


async def test_a_workflow_that_cannot_be_driven_on_keeps_back_no_other(settings: Settings):
    conductor = Looking(settings, ["broken", "whole"])
    conductor.errors["broken"] = KeyError("its definition is gone")
    assert await conductor.round() == 2
    assert conductor.looked == ["whole"]
    assert conductor.repository.postponed == ["broken"]
