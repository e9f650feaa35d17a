"""The stack: an API, workers, and what makes them safe."""
