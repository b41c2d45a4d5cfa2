"""When a reduced gradient shard is applied: the policies, and where offloaded gradients wait."""
