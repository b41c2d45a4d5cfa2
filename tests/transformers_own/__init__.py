"""transformers' own tests of its Trainer with DeepSpeed, run with this engine; no default tests."""
