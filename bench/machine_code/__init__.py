"""Kernels compiled for GPUs that are not there, and what their machine code says."""
