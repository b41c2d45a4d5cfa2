"""Zeroth order: what a step adds to the weights, and what it makes of the losses there. Pure maths."""
