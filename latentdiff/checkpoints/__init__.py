"""Checkpoint files as named arrays, and back; no networks."""
