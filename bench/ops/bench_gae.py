"""Advantages and returns of a rollout: 256 rows of 1,024 tokens, float32, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.memory import peak_bytes
from rlhf_fast import ops

ROWS, COLUMNS = 256, 1024
BYTES = ROWS * COLUMNS * (4 * 2 + 1 + 4 * 2)  # rewards, values, mask; advantages, returns
GAMMA, LAM = 1.0, 0.95


def python_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """DeepSpeed-Chat's and TRL's way: a column at a time from the right, in Python."""
    last, columns = rewards.new_zeros(mask.shape[0]), []
    for t in reversed(range(mask.shape[1])):
        following = values[:, t + 1] if t + 1 < mask.shape[1] else 0.0
        last = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * last
        columns.append(last)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def doubling(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """torch eager without a loop over columns: runs of 1, 2, 4, ... tokens are joined."""
    advantages = rewards - values
    advantages[:, :-1] += GAMMA * values[:, 1:]
    span = 1
    while span < mask.shape[1]:
        longer = advantages.clone()
        longer[:, :-span] += (GAMMA * LAM) ** span * advantages[:, span:]
        advantages, span = longer, 2 * span
    return advantages, advantages + values


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
