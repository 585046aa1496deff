"""ppo_loss over a batch of 256 responses of 1,024 tokens, float32, on the CPU, loss and gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.memory import peak_bytes
from rlhf_fast import ops

SHAPE = (256, 1024)
TOKENS = SHAPE[0] * SHAPE[1]
ROUNDS = 40
FLOOR = "floor: three reads and a write"


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logprobs = -2 * torch.rand(SHAPE, generator=generator)
    return {
        "logprobs": logprobs.requires_grad_(),
        "old_logprobs": logprobs.detach() + 0.1 * torch.randn(SHAPE, generator=generator),
        "advantages": torch.randn(SHAPE, generator=generator),
        "mask": torch.rand(SHAPE, generator=generator) < 0.8,
    }


def eager(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """The loss and the statistics as TRL and verl write them."""
    log_ratio = logprobs - old_logprobs
    ratio = torch.exp(log_ratio)
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    count = mask.sum()

    def mean(x: Tensor) -> Tensor:
        return (x * mask).sum() / count

    loss = mean(torch.max(unclipped, clipped))
    with torch.no_grad():
        stats = mean(0.5 * log_ratio.square()), mean((clipped > unclipped).float()), ratio.max()
    return loss, *stats


def ours(**given: Any) -> tuple[Tensor, ...]:
    found = ops.ppo_loss(**given)
    return found.policy_loss, *found.stats.values()


STEPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "rlhf_fast": ours,
    "torch eager": eager,
    "torch.compile": torch.compile(eager),
}


@pytest.mark.benchmark(group=f"ppo_loss, forward and backward, {SHAPE[0]}x{SHAPE[1]} float32")
@pytest.mark.parametrize("name", [*STEPS, FLOOR])
def test_forward_and_backward(benchmark: Any, name: str) -> None:
    given = inputs()
    benchmark.extra_info["bytes"] = TOKENS * (4 * 4 + 1)
    if name == FLOOR:
        out = torch.empty(SHAPE)
        a, b, c = (x.detach() for x in list(given.values())[:3])
        benchmark.pedantic(torch.addcmul, (a, b, c), {"out": out}, rounds=ROUNDS, warmup_rounds=5)
        return

    def step() -> Tensor:
        return torch.autograd.grad(STEPS[name](**given)[0], given["logprobs"])[0]

    (expected,) = torch.autograd.grad(eager(**given)[0], given["logprobs"])
    torch.testing.assert_close(step(), expected, rtol=1e-5, atol=1e-10)
    benchmark.extra_info["memory"] = peak_bytes(step)
    benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=5)
