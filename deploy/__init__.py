"""What runs the stack: on one machine (native/), in containers (what the compose files mount)."""
