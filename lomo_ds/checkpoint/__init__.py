"""Model folders: reading them into ZeRO-3's shards and writing them out again."""
