"""`make gpu-check`: what has to be measured on a GPU, in ten minutes."""
