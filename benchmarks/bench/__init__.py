"""Memory, time and bytes sent of every way to train, side by side."""
