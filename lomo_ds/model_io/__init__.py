"""Hugging Face model folders to ZeRO-3's shards and back."""
