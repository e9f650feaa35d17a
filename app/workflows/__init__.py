"""Workflows: which tasks, in which order, with what undoes them. One module a kind."""

from collections.abc import Iterable
from importlib import import_module

from app.engine.workflows import Definition
from app.workflows import dataset, fulfilment, onboarding, orders

DEFINITIONS: dict[str, Definition] = {
    definition.kind: definition
    for definition in (
        dataset.DEFINITION,
        onboarding.DEFINITION,
        orders.DEFINITION,
        fulfilment.DEFINITION,
    )
}


def load(modules: Iterable[str]) -> dict[str, Definition]:
    """The definitions here and those that `modules` have under the same name. Raises `ImportError`."""
    found = dict(DEFINITIONS)
    for module in modules:
        found |= import_module(module).DEFINITIONS
    return found
