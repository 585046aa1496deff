"""Which implementation of an op runs."""

from __future__ import annotations

import os
from typing import Literal, get_args

import torch
from torch import Tensor

from rlhf_fast.build import load_ops
from rlhf_fast.ops.reference._common import compute_dtype

Backend = Literal["auto", "triton", "cpp", "reference"]
Implementation = Literal["triton", "cpp", "reference"]


def choose_backend(op: str, backend: Backend, device: torch.device, dtype: torch.dtype) -> Implementation:
    """The implementation that backend names; for "auto" the fastest on this device that computes in dtype.

    That is not Triton for float64: its kernels compute in float32. Raises ValueError for an unknown name and for one
    that the device is not for.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"{op}: backend must be one of {', '.join(map(repr, get_args(Backend)))}; got {backend!r}")
    if backend == "auto":
        if device.type == "cpu":
            return "cpp"
        return "triton" if device.type == "cuda" and dtype != torch.float64 else "reference"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own debugging mode, slow and on any device
    if backend == "triton" and device.type != "cuda" and not interpreted:
        raise ValueError(f"{op}: backend 'triton' is for tensors on a GPU; these are on {device}")
    if backend == "cpp" and device.type == "cuda":
        raise ValueError(f"{op}: backend 'cpp' is for tensors on a CPU; these are on {device}")
    return backend


def choose_backend_without_gradient(
    op: str, backend: Backend, device: torch.device, **inputs: Tensor | None
) -> Implementation:
    """As choose_backend, for an op that has a gradient only in the reference.

    "auto" takes the reference when an input wants a gradient; "cpp" and "triton" are a ValueError then.
    """
    implementation = choose_backend(op, backend, device, compute_dtype(*inputs.values()))
    wanting = [name for name, x in inputs.items() if x is not None and x.requires_grad]
    if implementation == "reference" or not wanting or not torch.is_grad_enabled():
        return implementation
    if backend == "auto":
        return "reference"
    raise ValueError(
        f"{op}: backend {backend!r} has no gradient, and {wanting[0]} requires one; "
        f"use {wanting[0]}.detach(), torch.no_grad() or backend 'reference'"
    )


@torch.compiler.assume_constant_result
def load_compiled_ops() -> None:
    """Build or load the C++ ops, torch.ops.rlhf_fast.*. Under torch.compile this runs while the graph is traced.

    Raises BuildError where there is no compiler: nothing slower takes over in silence.
    """
    load_ops()


def divisor(num_tokens: int | float | Tensor | None) -> tuple[Tensor | None, float | None]:
    """num_tokens as operators take it: a tensor or a number, neither for the mask's own count."""
    if isinstance(num_tokens, Tensor):
        return num_tokens.detach(), None
    return None, None if num_tokens is None else float(num_tokens)
