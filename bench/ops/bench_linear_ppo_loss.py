"""linear_ppo_loss at the head of GPT-2: 2,048 tokens, 768 numbers each, 50,257 words, float32, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.memory import peak_bytes
from rlhf_fast import ops

ROWS, WIDTH, VOCABULARY = 2048, 768, 50_257
ROUNDS = 3
CHUNK = 64

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def clipped_sum(hidden: Tensor, weight: Tensor, ids: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """PPO's loss as TRL and OpenRLHF write it, before the mean."""
    logprobs = torch.log_softmax(F.linear(hidden, weight), dim=-1).gather(-1, ids[:, None])[:, 0]
    ratio = torch.exp(logprobs - old_logprobs)
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).sum()


def eager(*given: Tensor) -> Tensor:
    """With all logits in memory."""
    return clipped_sum(*given) / ROWS


def checkpointed_chunks(hidden: Tensor, weight: Tensor, *tokens: Tensor) -> Tensor:
    """verl's way: chunks of tokens, each one's logits made again in the backward pass."""
    chunks = zip(hidden.split(CHUNK), *(x.split(CHUNK) for x in tokens), strict=True)
    return sum(checkpoint(clipped_sum, h, weight, *rest, use_reentrant=False) for h, *rest in chunks) / ROWS


def gradients_in_the_forward(hidden: Tensor, weight: Tensor, *tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Liger's way: autograd of one chunk after the other, the gradients added up."""
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for start in range(0, ROWS, CHUNK):
        rows = slice(start, start + CHUNK)
        leaf = hidden[rows].detach().requires_grad_()
        loss = clipped_sum(leaf, weight, *(x[rows] for x in tokens)) / ROWS
        grad_hidden[rows], part = torch.autograd.grad(loss, (leaf, weight))
        grad_weight += part
    return grad_hidden, grad_weight


def ours(hidden: Tensor, weight: Tensor, ids: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    mask = torch.ones_like(ids, dtype=torch.bool)
    return ops.linear_ppo_loss(hidden, weight, ids, old_logprobs, advantages, mask).policy_loss


def differentiated(loss: Loss) -> Callable[..., tuple[Tensor, ...]]:
    return lambda hidden, weight, *tokens: torch.autograd.grad(loss(hidden, weight, *tokens), (hidden, weight))


def three_products(hidden: Tensor, weight: Tensor, *_: Tensor) -> None:
    with torch.no_grad():
        logits = F.linear(hidden, weight)
        torch.mm(logits, weight)
        torch.mm(logits.T, hidden)


STEPS: dict[str, Callable[..., Any]] = {
    "rlhf_fast": differentiated(ours),
    "torch eager, all logits": differentiated(eager),
    "torch.compile, all logits": differentiated(torch.compile(eager)),
    "verl: checkpointed chunks": differentiated(checkpointed_chunks),
    "Liger: gradients in the forward": gradients_in_the_forward,
    "floor: three products": three_products,
}


def inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator) / 28
    ids = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    logprobs = torch.log_softmax(F.linear(hidden, weight), dim=-1).gather(-1, ids[:, None])[:, 0]
    old_logprobs = logprobs + 0.1 * torch.randn(ROWS, generator=generator)
    advantages = torch.randn(ROWS, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), ids, old_logprobs, advantages


@pytest.mark.benchmark(group=f"linear_ppo_loss, loss and gradients, {ROWS}x{WIDTH}x{VOCABULARY} float32")
@pytest.mark.parametrize("name", STEPS)
def test_loss_and_gradients(benchmark: Any, name: str) -> None:
    given = inputs()
    benchmark.extra_info["memory"] = peak_bytes(lambda: STEPS[name](*given))
    found = benchmark.pedantic(STEPS[name], given, rounds=ROUNDS)
    if name == "rlhf_fast":
        for a, b in zip(found, differentiated(eager)(*given), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
