"""Host memory of loading a model into shards and of exporting it."""
