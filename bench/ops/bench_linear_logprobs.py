"""linear_logprobs at the head of GPT-2: 512 tokens, 768 numbers each, 50,257 words, float32, on the CPU."""

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

ROWS, WIDTH, VOCABULARY = 512, 768, 50_257
ROUNDS = 3
WORDS = 4096  # in a chunk of the vocabulary

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """With all logits in memory."""
    return torch.log_softmax(F.linear(hidden, weight), dim=-1).gather(-1, ids[:, None])[:, 0]


def checkpointed_chunks(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """verl's way: chunks of tokens, each one's logits made again in the backward pass."""
    chunks = zip(hidden.split(64), ids.split(64), strict=True)
    return torch.cat([checkpoint(eager, h, weight, i, use_reentrant=False) for h, i in chunks])


class _VocabularyChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        largest = hidden.new_full((len(hidden),), -torch.inf)
        total, chosen = hidden.new_zeros(len(hidden)), hidden.new_zeros(len(hidden))
        for start in range(0, len(weight), WORDS):
            logits = F.linear(hidden, weight[start : start + WORDS])
            raised = torch.maximum(largest, logits.amax(dim=-1))
            total = total * (largest - raised).exp() + (logits - raised[:, None]).exp().sum(dim=-1)
            largest = raised
            here = (ids >= start) & (ids < start + WORDS)
            inside = (ids - start).clamp(0, logits.shape[1] - 1)[:, None]
            chosen = torch.where(here, logits.gather(-1, inside)[:, 0], chosen)
        log_sum = largest + total.log()
        ctx.save_for_backward(hidden, weight, ids, log_sum)
        return chosen - log_sum

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, ids, log_sum = ctx.saved_tensors
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.empty_like(weight)
        for start in range(0, len(weight), WORDS):
            words = slice(start, start + WORDS)
            gradient = F.linear(hidden, weight[words]).sub_(log_sum[:, None]).exp_().mul_(-upstream[:, None])
            rows = ((ids >= start) & (ids < start + WORDS)).nonzero()[:, 0]
            gradient[rows, ids[rows] - start] += upstream[rows]
            grad_hidden.addmm_(gradient, weight[words])
            torch.mm(gradient.T, hidden, out=grad_weight[words])
        return grad_hidden, grad_weight, None


def vocabulary_chunks(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """RL-Kernel's way by its description: online softmax over parts of the vocabulary, made again backward."""
    found: Tensor = _VocabularyChunks.apply(hidden, weight, ids)
    return found


def ours(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    logprobs = ops.linear_logprobs(hidden, weight, ids)
    assert isinstance(logprobs, Tensor)
    return logprobs


PEERS: dict[str, Forward] = {
    "torch eager, all logits": eager,
    "torch.compile, all logits": torch.compile(eager),
    "verl: checkpointed chunks": checkpointed_chunks,
    "RL-Kernel: chunks of the vocabulary": vocabulary_chunks,
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
        forward = {"rlhf_fast": ours, **PEERS}[name]
        benchmark.extra_info["memory"] = peak_bytes(lambda: forward(hidden, weight, ids))
        found = benchmark.pedantic(forward, (hidden, weight, ids), rounds=ROUNDS)
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

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(hidden, weight, ids), leaves, upstream)

    benchmark.extra_info["memory"] = peak_bytes(step)
    found = benchmark.pedantic(step, rounds=ROUNDS)
    expected = torch.autograd.grad(eager(hidden, weight, ids), leaves, upstream)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
