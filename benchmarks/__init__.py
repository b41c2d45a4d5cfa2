"""Side-by-side measurements; each folder writes one page of docs/benchmarks."""
