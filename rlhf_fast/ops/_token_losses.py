"""What ppo_loss and value_loss share on their way to a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops._dispatch import Backend


def for_dtype(backend: Backend, *tensors: Tensor | None) -> Backend:
    """The backend asked for, or the reference for float64 on a GPU: the Triton kernels compute in float32."""
    double = any(t is not None and t.is_cuda and t.dtype == torch.float64 for t in tensors)
    return "reference" if backend == "auto" and double else backend


def divisor(num_tokens: int | float | Tensor | None) -> tuple[Tensor | None, float | None]:
    """num_tokens as the operators take it: a tensor or a number, neither for the mask's own count."""
    if isinstance(num_tokens, Tensor):
        return num_tokens.detach(), None
    return None, None if num_tokens is None else float(num_tokens)
