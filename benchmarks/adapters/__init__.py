"""LoRA alone, LOMO + LoRA and LOMO alone."""
