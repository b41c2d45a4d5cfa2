"""Bytes and time of saving and loading a checkpoint."""
