"""The networks that the engine can run, each with explicit cache arguments."""
