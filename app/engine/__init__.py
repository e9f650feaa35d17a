"""What makes tasks safe: their state, their messages, and the base class that runs them."""
