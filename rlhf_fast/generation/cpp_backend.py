"""Decoding on the CPU with the C++ decoder, on the model's own parameters where they lie."""

from __future__ import annotations

from typing import Any

from rlhf_fast.build import load_generation

from .decoded import Decoded
from .loop import Counts, complete
from .model_spec import Spec


def decode(spec: Spec, *arguments: Any, **options: Any) -> tuple[Decoded, Counts]:
    """As loop.complete."""
    return complete(load_generation().CpuBackend(spec.model), *arguments, **options)
