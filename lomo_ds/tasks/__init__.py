"""Data sets, prompts, batches and scores."""
