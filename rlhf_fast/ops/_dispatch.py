"""Which implementation of an op runs."""

from __future__ import annotations

import os
from typing import Literal, get_args

import torch
from torch import Tensor

from rlhf_fast.build import load_ops

Backend = Literal["auto", "triton", "cpp", "reference"]
Implementation = Literal["triton", "cpp", "reference"]


def choose_backend(
    op: str, backend: Backend, available: tuple[Implementation, ...], device: torch.device
) -> Implementation:
    """The implementation that backend names; for "auto" the fastest that the op has on this device.

    Raises ValueError for an unknown name, for one that the op has not got, and for one that the device is not for.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"{op}: backend must be one of {', '.join(map(repr, get_args(Backend)))}; got {backend!r}")
    if backend == "auto":
        fastest: dict[str, Implementation] = {"cuda": "triton", "cpu": "cpp"}
        choice = fastest.get(device.type, "reference")
        return choice if choice in available else "reference"
    if backend not in available:
        there_is = ", ".join(map(repr, available))
        raise ValueError(f"{op} has no {backend!r} backend yet; it has {there_is}, and 'auto' takes the fastest")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own debugging mode, slow and on any device
    if backend == "triton" and device.type != "cuda" and not interpreted:
        raise ValueError(f"{op}: backend 'triton' is for tensors on a GPU; these are on {device}")
    if backend == "cpp" and device.type == "cuda":
        raise ValueError(f"{op}: backend 'cpp' is for tensors on a CPU; these are on {device}")
    return backend


def choose_backend_without_gradient(
    op: str, backend: Backend, device: torch.device, **inputs: Tensor | None
) -> Implementation:
    """As choose_backend, for an op that has all implementations but a gradient only in the reference.

    "auto" takes the reference when an input wants a gradient, and for float64 on a GPU: the Triton kernels compute in
    float32. ValueError for "cpp" and "triton" when an input wants a gradient.
    """
    if backend == "auto" and device.type == "cuda":
        backend = "reference" if any(x is not None and x.dtype == torch.float64 for x in inputs.values()) else "auto"
    implementation = choose_backend(op, backend, ("triton", "cpp", "reference"), device)
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
