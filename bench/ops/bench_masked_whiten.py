"""Whitening the advantages of a rollout: 256 rows of 1,024 tokens, float32, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.memory import peak_bytes
from rlhf_fast import ops

ROWS, COLUMNS = 256, 1024
BYTES = ROWS * COLUMNS * (2 * (4 + 1) + 4)  # numbers and mask twice; whitened


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def trl(x: Tensor, mask: Tensor) -> Tensor:
    """TRL's formula: masked mean, then masked variance; here biased, as ours, and 0 outside the mask."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def floor(x: Tensor, mask: Tensor) -> Tensor:
    x.sum()
    mask.clone()
    return x.clone()


RUNS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rlhf_fast": ops.masked_whiten,
    "torch eager": ops.reference.masked_whiten,
    "TRL's formula": trl,
    "torch.compile of it": torch.compile(trl),
    "floor: two reads and a write": floor,
}


@pytest.mark.benchmark(group=f"masked_whiten, {ROWS}x{COLUMNS} float32")
@pytest.mark.parametrize("name", RUNS)
def test_masked_whiten(benchmark: Any, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, COLUMNS, generator=generator)
    mask = torch.rand(ROWS, COLUMNS, generator=generator) < 0.8
    benchmark.extra_info["bytes"] = BYTES
    benchmark.extra_info["memory"] = peak_bytes(lambda: RUNS[name](x, mask))
    found = benchmark.pedantic(RUNS[name], (x, mask), rounds=30, warmup_rounds=3)
    if not name.startswith("floor"):
        torch.testing.assert_close(found.double(), trl(x.double(), mask), rtol=1e-4, atol=1e-5)
