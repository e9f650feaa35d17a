"""Workflows: which tasks, in which order, with what undoes them. One module a kind."""

from app.engine.workflows import Definition
from app.workflows.fulfilment import FULFILMENT
from app.workflows.orders import ORDERS

DEFINITIONS: dict[str, Definition] = {definition.kind: definition for definition in (ORDERS, FULFILMENT)}
