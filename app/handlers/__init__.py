"""What services do with events: one module a service, run by `python -m app.subscriber <service>`."""
