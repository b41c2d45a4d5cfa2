"""Update rules: tensor maths on one shard. Nothing here communicates or knows DeepSpeed."""
