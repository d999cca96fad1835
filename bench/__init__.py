"""Benchmarks: times against peers, and the machine code of the kernels without a GPU."""
