"""linear_cross_entropy at the head of GPT-2: 512 tokens, 768 numbers each, 50,257 words, float32, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.memory import peak_bytes
from rlhf_fast import ops

ROWS, WIDTH, VOCABULARY = 512, 768, 50_257
ROUNDS = 3
CHUNK = 64

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """With all logits in memory."""
    return F.cross_entropy(F.linear(hidden, weight), ids)


def gradients_in_the_forward(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Liger's way: each chunk's logits become softmax - one_hot, and two products follow."""
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    with torch.no_grad():
        for start in range(0, ROWS, CHUNK):
            rows = slice(start, start + CHUNK)
            p = torch.softmax(F.linear(hidden[rows], weight), dim=-1)
            p[torch.arange(len(p)), ids[rows]] -= 1
            p /= ROWS
            grad_hidden[rows] = p @ weight
            grad_weight += p.T @ hidden[rows]
    return grad_hidden, grad_weight


def ours(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return ops.linear_cross_entropy(hidden, weight, ids, torch.ones_like(ids, dtype=torch.bool)).loss


def differentiated(loss: Loss) -> Callable[..., tuple[Tensor, ...]]:
    return lambda hidden, weight, ids: torch.autograd.grad(loss(hidden, weight, ids), (hidden, weight))


def three_products(hidden: Tensor, weight: Tensor, _: Tensor) -> None:
    with torch.no_grad():
        logits = F.linear(hidden, weight)
        torch.mm(logits, weight)
        torch.mm(logits.T, hidden)


STEPS: dict[str, Callable[..., Any]] = {
    "rlhf_fast": differentiated(ours),
    "torch eager, all logits": differentiated(eager),
    "torch.compile, all logits": differentiated(torch.compile(eager)),
    "Liger: gradients in the forward": gradients_in_the_forward,
    "floor: three products": three_products,
}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator) / 28
    ids = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), ids


@pytest.mark.benchmark(group=f"linear_cross_entropy, loss and gradients, {ROWS}x{WIDTH}x{VOCABULARY} float32")
@pytest.mark.parametrize("name", STEPS)
def test_loss_and_gradients(benchmark: Any, name: str) -> None:
    given = inputs()
    benchmark.extra_info["memory"] = peak_bytes(lambda: STEPS[name](*given))
    found = benchmark.pedantic(STEPS[name], given, rounds=ROUNDS)
    if name == "rlhf_fast":
        for a, b in zip(found, differentiated(eager)(*given), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
