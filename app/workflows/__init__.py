"""Workflows: which tasks, in which order, with what undoes them. One module a kind."""

from app.engine.workflows import Definition

DEFINITIONS: dict[str, Definition] = {}
