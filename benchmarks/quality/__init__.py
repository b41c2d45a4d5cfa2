"""Task quality of several ways to train."""
