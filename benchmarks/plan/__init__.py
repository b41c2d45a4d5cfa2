"""Dry runs of large models, the floor, the paper's Table 1, and dry runs compared with real runs."""
