"""Kernels: tensors in, tensors out. `reference`, `greedy` and `attention` specify them, `triton_*` run them on GPUs."""
