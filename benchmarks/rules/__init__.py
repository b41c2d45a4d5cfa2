"""Update rules compared by held-out loss, at equal steps and on the same batches."""
