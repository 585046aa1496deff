"""value_loss over a batch of 256 responses of 1,024 tokens, float32, on the CPU, loss and gradient."""

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
    values = torch.randn(SHAPE, generator=generator)
    return {
        "values": values.requires_grad_(),
        "old_values": values.detach() + 0.2 * torch.randn(SHAPE, generator=generator),
        "returns": values.detach() + torch.randn(SHAPE, generator=generator),
        "mask": torch.rand(SHAPE, generator=generator) < 0.8,
    }


def eager(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the share of clipped tokens as TRL writes them."""
    near_old = torch.clamp(values, old_values - 0.2, old_values + 0.2)
    error, clipped_error = (values - returns).square(), (near_old - returns).square()
    count = mask.sum()
    loss = 0.5 * (torch.max(error, clipped_error) * mask).sum() / count
    return loss, ((clipped_error > error) * mask).sum() / count


def ours(**given: Any) -> tuple[Tensor, Tensor]:
    loss, stats = ops.value_loss(**given)
    return loss, stats["value_clip_fraction"]


STEPS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "rlhf_fast": ours,
    "torch eager": eager,
    "torch.compile": torch.compile(eager),
}


@pytest.mark.benchmark(group=f"value_loss, forward and backward, {SHAPE[0]}x{SHAPE[1]} float32")
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
        return torch.autograd.grad(STEPS[name](**given)[0], given["values"])[0]

    (expected,) = torch.autograd.grad(eager(**given)[0], given["values"])
    torch.testing.assert_close(step(), expected, rtol=1e-5, atol=1e-10)
    benchmark.extra_info["memory"] = peak_bytes(step)
    benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=5)
