"""logits_ppo_loss at the head of a small model: 512 tokens, 32,000 words, float32, on the CPU, loss and gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.memory import peak_bytes
from bench.ops import peers
from rlhf_fast import ops

ROWS, VOCABULARY = 512, 32_000
BYTES = 4 * ROWS * VOCABULARY  # of the logits
ROUNDS = 15

Step = Callable[[Tensor], Tensor]


def inputs() -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and ids, old log-probs, advantages and mask, most of the ratios within the clip range."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(ROWS, VOCABULARY, generator=generator)
    ids = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    drift = 0.1 * torch.randn(ROWS, generator=generator)
    return logits, {
        "ids": ids,
        "old_logprobs": torch.log_softmax(logits, dim=-1).gather(-1, ids[:, None])[:, 0] + drift,
        "advantages": torch.randn(ROWS, generator=generator),
        "mask": torch.ones(ROWS, dtype=torch.bool),
    }


def clipped_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """PPO's loss as TRL and OpenRLHF write it."""
    ratio = torch.exp(logprobs - old_logprobs)
    losses = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    return (losses * mask).sum() / mask.sum()


def from_logprobs(logprobs_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The loss from logits by way of the log-probs."""
    return lambda logits, ids, **rest: clipped_loss(logprobs_of(logits, ids), **rest)


eager = from_logprobs(peers.eager)


def ours(logits: Tensor, **rest: Any) -> Tensor:
    return ops.logits_ppo_loss(logits, **rest).policy_loss


LOSSES: dict[str, Callable[..., Tensor]] = {
    "rlhf_fast": ours,
    "torch eager": eager,
    "torch.compile": torch.compile(eager),
    "TRL's and verl's selective_log_softmax": from_logprobs(peers.selective_log_softmax),
    "Liger's formula, in place": from_logprobs(peers.from_logsumexp_in_place),
}


def from_a_head(logits: Tensor) -> Tensor:
    """As a head hands them over: not a leaf, and nobody else's."""
    return logits.requires_grad_() * 1


@pytest.mark.benchmark(group=f"logits_ppo_loss, forward and backward, {ROWS}x{VOCABULARY} float32")
@pytest.mark.parametrize("name", [*LOSSES, "floor: one read, one write back"])
def test_forward_and_backward(benchmark: Any, name: str) -> None:
    logits, rest = inputs()
    benchmark.extra_info["bytes"] = 2 * BYTES
    if name.startswith("floor"):
        benchmark.pedantic(logits.mul_, (1.0,), rounds=ROUNDS, warmup_rounds=3)
        return

    def step(logits: Tensor) -> Tensor:
        return torch.autograd.grad(LOSSES[name](logits, **rest), logits)[0]

    (expected,) = torch.autograd.grad(eager(leaf := logits.clone().requires_grad_(), **rest), leaf)
    torch.testing.assert_close(step(from_a_head(logits)), expected, rtol=1e-4, atol=1e-9)
    again = from_a_head(logits)
    benchmark.extra_info["memory"] = peak_bytes(lambda: step(again))
    benchmark.pedantic(step, setup=lambda: ((from_a_head(logits),), {}), rounds=ROUNDS, warmup_rounds=3)
