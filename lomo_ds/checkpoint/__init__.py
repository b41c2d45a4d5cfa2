"""Checkpoints of an engine: saving them, resuming from them, exporting them."""
