"""Zeroth order on shards: forwards at points around the weights, and one update of the shards a step."""
