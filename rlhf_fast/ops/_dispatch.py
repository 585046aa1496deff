"""Which implementation of an op runs."""

from __future__ import annotations

from typing import Literal, get_args

import torch

Backend = Literal["auto", "triton", "cpp", "reference"]
Implementation = Literal["triton", "cpp", "reference"]

REFERENCE_ONLY: tuple[Implementation, ...] = ("reference",)


def choose_backend(
    op: str, backend: Backend, available: tuple[Implementation, ...], device: torch.device
) -> Implementation:
    """The implementation that backend names; for "auto" the fastest that the op has on this device.

    Raises ValueError for an unknown name and for one that the op has not got.
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
    return backend
