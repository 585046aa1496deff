"""What the kernels of csrc/cuda compute, in plain PyTorch: a module a kernel, in float64 where a kernel adds up.

Numbers are rounded to the model's type where the kernels round; see csrc/generation/layers.h.
"""
