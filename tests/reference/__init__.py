"""Searches written for reading, against which the engine is held. They know nothing of the engine but its options."""
