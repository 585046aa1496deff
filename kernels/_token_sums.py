"""What ppo_loss and value_loss share on the GPU: blocks of tokens, each with its sums, and the loss's known gradient.

Under TRITON_INTERPRET=1 the kernels run on CPU tensors, which the tests use.
"""

# Triton reads the annotations of a kernel's arguments as their types, so they carry none.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # tokens of a program: four 16-byte loads of every tensor for each of its 64 threads
LAUNCH = {"num_warps": 2, "enable_fp_fusion": True}


@triton.jit
def token_values(x, place, exists, inside):
    # Masked-out tokens are read too and then dropped: only so can a thread load four tokens at once.
    return tl.where(inside, tl.load(x + place, mask=exists, other=0.0), 0.0)


def per_token(x: Tensor | None) -> Tensor | None:
    """As the kernels take it: contiguous float32."""
    return None if x is None else x.detach().to(torch.float32).contiguous()


def token_count(mask: Tensor, num_tokens: Tensor | None, number: float | None) -> Tensor:
    """The divisor of the sums as a 0-d tensor: the given one (a tensor is at least 1), else the masked tokens, at
    least 1. Nothing waits for the GPU."""
    if number is not None:
        return torch.full((), number, dtype=torch.float32, device=mask.device)
    if num_tokens is not None:
        return num_tokens.detach().reshape(()).to(torch.float32).clamp(min=1)
    return mask.sum().to(torch.float32).clamp(min=1)


def check(op: str, mask: Tensor, *tensors: Tensor | None) -> None:
    """The kernels' own conditions; a wrong shape would be a wild read."""
    if not (mask.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(f"{op}: Triton needs tensors on a GPU; got {mask.device}")
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            raise TypeError(f"{op}: backend 'triton' computes in float32; got float64 arguments")
        if x is not None and x.shape != mask.shape:
            raise ValueError(
                f"{op}: per-token arguments must have mask's shape {list(mask.shape)}; got {list(x.shape)}"
            )


def chain(ctx: Any, grad_loss: Tensor | None) -> list[Tensor | None]:
    """The gradients that the forward pass found, times the loss's own."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{ctx.op} has no second derivative (create_graph=True)")
    return [None if x.numel() == 0 or grad_loss is None else x * grad_loss for x in ctx.saved_tensors]
