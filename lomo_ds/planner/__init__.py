"""What a run will take before it is started: the real engine on tensors without data, and a closed form."""
