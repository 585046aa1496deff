"""Advantages and returns of a rollout: 256 rows of 1,024 tokens, float32, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.memory import peak_bytes
from bench.ops.peers import scan_by_column, scan_by_doubling
from rlhf_fast import ops

ROWS, COLUMNS = 256, 1024
BYTES = ROWS * COLUMNS * (4 * 2 + 1 + 4 * 2)  # rewards, values, mask; advantages, returns
GAMMA, LAM = 1.0, 0.95


def python_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return scan_by_column(rewards, values, GAMMA, LAM)


def doubling(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return scan_by_doubling(rewards, values, GAMMA, LAM)


def ours(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return ops.gae(rewards, values, mask, gamma=GAMMA, lam=LAM)


def floor(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    mask.clone()
    return rewards.clone(), values.clone()


RUNS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "rlhf_fast": ours,
    "Python loop of DeepSpeed-Chat and TRL": python_loop,
    "torch eager by doubling": doubling,
    "torch.compile of it": torch.compile(doubling),
    "floor: copies of the same bytes": floor,
}


@pytest.mark.benchmark(group=f"gae, {ROWS}x{COLUMNS} float32")
@pytest.mark.parametrize("name", RUNS)
def test_gae(benchmark: Any, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(2))
    mask = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    benchmark.extra_info["bytes"] = BYTES
    benchmark.extra_info["memory"] = peak_bytes(lambda: RUNS[name](rewards, values, mask))
    found = benchmark.pedantic(RUNS[name], (rewards, values, mask), rounds=30, warmup_rounds=3)
    if not name.startswith("floor"):
        for actual, expected in zip(found, python_loop(rewards.double(), values.double(), mask), strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
