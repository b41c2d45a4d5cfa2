"""One file per command; `main` finds them."""
