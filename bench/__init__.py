"""Benchmarks: timings against peers, and what the machine code of the kernels says without a GPU."""
