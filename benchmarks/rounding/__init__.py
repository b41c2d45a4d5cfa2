"""AdaLomo in fp32 and in bf16 with each way of rounding."""
