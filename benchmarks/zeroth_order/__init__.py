"""What a zeroth-order step takes, compared with a forward."""
