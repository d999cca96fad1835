"""Compiles kernels for absent GPUs and reads their machine code."""
