"""KL shaping, score, advantages and returns of a rollout: 256 rows of 1,024 tokens, float32, on the CPU."""

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
BYTES = ROWS * COLUMNS * (4 * 3 + 1 + 4 * 3)  # log-probs, reference, values, mask; advantages, returns, rewards
KL_COEF, GAMMA, LAM = 0.1, 1.0, 0.95

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def shaped(scores: Tensor, logprobs: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
    rewards = -KL_COEF * (logprobs - ref) * mask
    last = mask.long().cumsum(1).argmax(1)
    rewards[torch.arange(mask.shape[0]), last] += scores
    return rewards


def python_loop(scores: Tensor, logprobs: Tensor, ref: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    rewards = shaped(scores, logprobs, ref, mask)
    return *scan_by_column(rewards, values, GAMMA, LAM), rewards


def doubling(scores: Tensor, logprobs: Tensor, ref: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    rewards = shaped(scores, logprobs, ref, mask)
    return *scan_by_doubling(rewards, values, GAMMA, LAM), rewards


def ours(scores: Tensor, logprobs: Tensor, ref: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    return ops.shaped_gae(scores, logprobs, ref, values, mask, kl_coef=KL_COEF, gamma=GAMMA, lam=LAM)


def floor(scores: Tensor, logprobs: Tensor, ref: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    mask.clone()
    return logprobs.clone(), ref.clone(), values.clone()


RUNS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "rlhf_fast": ours,
    "Python loop of DeepSpeed-Chat and TRL": python_loop,
    "torch eager by doubling": doubling,
    "torch.compile of it": torch.compile(doubling),
    "floor: copies of the same bytes": floor,
}


def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    logprobs, ref, values = (torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(3))
    mask = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    return torch.randn(ROWS, generator=generator), logprobs, ref, values, mask


@pytest.mark.benchmark(group=f"shaped_gae, {ROWS}x{COLUMNS} float32")
@pytest.mark.parametrize("name", RUNS)
def test_shaped_gae(benchmark: Any, name: str) -> None:
    given = inputs()
    benchmark.extra_info["bytes"] = BYTES
    benchmark.extra_info["memory"] = peak_bytes(lambda: RUNS[name](*given))
    found = benchmark.pedantic(RUNS[name], given, rounds=30, warmup_rounds=3)
    if not name.startswith("floor"):
        scores, logprobs, ref, values, mask = given
        exact = python_loop(scores.double(), logprobs.double(), ref.double(), values.double(), mask)
        for actual, expected in zip(found, exact, strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
