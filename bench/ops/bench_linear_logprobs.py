"""linear_logprobs at the head of GPT-2: 512 tokens, 768 numbers each, 50,257 words, float32, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_fast import ops

ROWS, WIDTH, VOCABULARY = 512, 768, 50_257
ROUNDS = 3

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """With all logits in memory."""
    return torch.log_softmax(F.linear(hidden, weight), dim=-1).gather(-1, ids[:, None])[:, 0]


def checkpointed_chunks(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """verl's and RL-Kernel's way: chunks of tokens, each one's logits made again in the backward pass."""
    chunks = zip(hidden.split(64), ids.split(64), strict=True)
    return torch.cat([checkpoint(eager, h, weight, i, use_reentrant=False) for h, i in chunks])


def ours(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    logprobs = ops.linear_logprobs(hidden, weight, ids)
    assert isinstance(logprobs, Tensor)
    return logprobs


PEERS: dict[str, Forward] = {
    "torch eager, all logits": eager,
    "torch.compile, all logits": torch.compile(eager),
    "checkpointed chunks": checkpointed_chunks,
}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator) / 10
    return hidden, weight, torch.randint(VOCABULARY, (ROWS,), generator=generator)


@pytest.mark.benchmark(group=f"linear_logprobs, forward, {ROWS}x{WIDTH}x{VOCABULARY} float32")
@pytest.mark.parametrize("name", ["rlhf_fast", *PEERS, "floor: the product"])
def test_forward(benchmark: Any, name: str) -> None:
    hidden, weight, ids = inputs()
    with torch.no_grad():
        if name.startswith("floor"):
            benchmark.pedantic(F.linear, (hidden, weight), rounds=ROUNDS, warmup_rounds=1)
            return
        found = benchmark.pedantic({"rlhf_fast": ours, **PEERS}[name], (hidden, weight, ids), rounds=ROUNDS)
        torch.testing.assert_close(found, eager(hidden, weight, ids), rtol=1e-5, atol=1e-4)


@pytest.mark.benchmark(group=f"linear_logprobs, forward and backward, {ROWS}x{WIDTH}x{VOCABULARY} float32")
@pytest.mark.parametrize("name", ["rlhf_fast", *PEERS, "floor: four products"])
def test_forward_and_backward(benchmark: Any, name: str) -> None:
    hidden, weight, ids = inputs()
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    upstream = torch.linspace(-1, 1, ROWS)
    if name.startswith("floor"):
        logits, grad_hidden, grad_weight = torch.empty(ROWS, VOCABULARY), *map(torch.empty_like, leaves)

        def floor() -> None:
            torch.mm(hidden, weight.T, out=logits)
            torch.mm(hidden, weight.T, out=logits)
            torch.mm(logits, weight, out=grad_hidden)
            torch.mm(logits.T, hidden, out=grad_weight)

        with torch.no_grad():
            benchmark.pedantic(floor, rounds=ROUNDS, warmup_rounds=1)
        return
    forward = {"rlhf_fast": ours, **PEERS}[name]
    found = benchmark.pedantic(
        lambda: torch.autograd.grad(forward(hidden, weight, ids), leaves, upstream), rounds=ROUNDS, warmup_rounds=1
    )
    expected = torch.autograd.grad(eager(hidden, weight, ids), leaves, upstream)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
