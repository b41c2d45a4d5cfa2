"""What zeroth order reaches on a task, by forward passes alone."""
