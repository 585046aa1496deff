"""gather_logprobs at the head of a small model: 512 tokens, 32,000 words, float32, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.memory import peak_bytes
from bench.ops.peers import eager, from_logsumexp_in_place, selective_log_softmax, with_entropy
from rlhf_fast import ops

ROWS, VOCABULARY = 512, 32_000
BYTES = 4 * ROWS * VOCABULARY  # of the logits
ROUNDS = 15

Forward = Callable[[Tensor, Tensor], Tensor]


def ours(logits: Tensor, ids: Tensor) -> Tensor:
    logprobs = ops.gather_logprobs(logits, ids)
    assert isinstance(logprobs, Tensor)
    return logprobs


def ours_in_place(logits: Tensor, ids: Tensor) -> Tensor:
    logprobs = ops.gather_logprobs(logits, ids, inplace_backward=True)
    assert isinstance(logprobs, Tensor)
    return logprobs


def ours_with_entropy(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return ops.gather_logprobs(logits, ids, return_entropy=True)


PEERS: dict[str, Forward] = {
    "torch eager": eager,
    "torch.compile": torch.compile(eager),
    "TRL's and verl's selective_log_softmax": selective_log_softmax,
}
WITH_ENTROPY: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "rlhf_fast": ours_with_entropy,
    "verl's formula": with_entropy,
    "torch.compile of it": torch.compile(with_entropy),
    "floor: one read": lambda logits, ids: (logits.sum(), logits),
}
IN_PLACE: dict[str, Forward] = {"rlhf_fast": ours_in_place, "Liger's formula": from_logsumexp_in_place}
FORWARD: dict[str, Forward] = {"rlhf_fast": ours, **PEERS, "floor: one read": lambda logits, ids: logits.sum()}
BACKWARD: dict[str, Forward] = {"rlhf_fast": ours, **PEERS}
BACKWARD_FLOOR = "floor: two reads and a write"
IN_PLACE_FLOOR = "floor: a read, then read and write back"


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(ROWS, VOCABULARY, generator=generator)
    return logits, torch.randint(VOCABULARY, (ROWS,), generator=generator)


@pytest.mark.benchmark(group=f"gather_logprobs, forward, {ROWS}x{VOCABULARY} float32")
@pytest.mark.parametrize("name", FORWARD)
def test_forward(benchmark: Any, name: str) -> None:
    logits, ids = inputs()
    benchmark.extra_info["bytes"] = BYTES
    with torch.no_grad():
        benchmark.extra_info["memory"] = peak_bytes(lambda: FORWARD[name](logits, ids))
        found = benchmark.pedantic(FORWARD[name], (logits, ids), rounds=ROUNDS, warmup_rounds=3)
        if not name.startswith("floor"):
            torch.testing.assert_close(found, eager(logits.double(), ids).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.benchmark(group=f"gather_logprobs with entropy, forward, {ROWS}x{VOCABULARY} float32")
@pytest.mark.parametrize("name", WITH_ENTROPY)
def test_forward_with_entropy(benchmark: Any, name: str) -> None:
    logits, ids = inputs()
    benchmark.extra_info["bytes"] = BYTES
    with torch.no_grad():
        benchmark.extra_info["memory"] = peak_bytes(lambda: WITH_ENTROPY[name](logits, ids))
        found = benchmark.pedantic(WITH_ENTROPY[name], (logits, ids), rounds=ROUNDS, warmup_rounds=3)
        if not name.startswith("floor"):
            for actual, expected in zip(found, with_entropy(logits.double(), ids), strict=True):
                torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.benchmark(group=f"gather_logprobs, forward and backward, {ROWS}x{VOCABULARY} float32")
@pytest.mark.parametrize("name", [*BACKWARD, BACKWARD_FLOOR])
def test_forward_and_backward(benchmark: Any, name: str) -> None:
    logits, ids = inputs()
    logits.requires_grad_()
    weights = torch.linspace(-1, 1, ROWS)
    benchmark.extra_info["bytes"] = 3 * BYTES

    if name == BACKWARD_FLOOR:
        written = torch.zeros_like(logits)

        def floor() -> None:
            logits.sum()
            written.copy_(logits)

        with torch.no_grad():
            benchmark.pedantic(floor, rounds=ROUNDS, warmup_rounds=3)
        return

    def step() -> Tensor:
        (gradient,) = torch.autograd.grad(BACKWARD[name](logits, ids), logits, weights)
        return gradient

    (expected,) = torch.autograd.grad(eager(logits, ids), logits, weights)
    torch.testing.assert_close(step(), expected, rtol=1e-4, atol=1e-7)
    benchmark.extra_info["memory"] = peak_bytes(step)
    benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=3)


@pytest.mark.benchmark(group=f"gather_logprobs, forward and backward in place, {ROWS}x{VOCABULARY} float32")
@pytest.mark.parametrize("name", [*IN_PLACE, IN_PLACE_FLOOR])
def test_in_place(benchmark: Any, name: str) -> None:
    """The gradient over the logits: each round starts from those that the one before left."""
    logits, ids = inputs()
    weights = torch.linspace(-1, 1, ROWS)
    benchmark.extra_info["bytes"] = 3 * BYTES
    if name == IN_PLACE_FLOOR:

        def run() -> None:
            logits.sum()
            logits.mul_(1.0)
    else:
        (expected,) = torch.autograd.grad(eager(leaf := logits.clone().requires_grad_(), ids), leaf, weights)
        logits.requires_grad_()

        def run() -> None:
            torch.autograd.grad(IN_PLACE[name](logits, ids), logits, weights)

        run()
        torch.testing.assert_close(logits.detach(), expected, rtol=1e-4, atol=1e-7)
        benchmark.extra_info["memory"] = peak_bytes(run)
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=3)
