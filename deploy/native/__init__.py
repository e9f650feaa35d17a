"""Run the whole stack on one machine without containers."""
