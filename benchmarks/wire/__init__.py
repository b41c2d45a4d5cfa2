"""Bytes on the wire of one clipped step."""
