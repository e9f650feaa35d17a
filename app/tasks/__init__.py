"""The work itself, one module a kind."""
