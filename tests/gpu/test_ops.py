"""The ops on a GPU, in Triton as compiled for it: the reference's numbers, forward and backward, at real sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast import ops

ROWS, COLUMNS, VOCABULARY, WIDTH = 8, 256, 32_000, 1024


def randn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def tokens() -> dict[str, Tensor]:
    """Per-token tensors [ROWS, COLUMNS] with a ragged mask."""
    lengths = torch.linspace(1, COLUMNS, ROWS, device="cuda").long()
    return {
        "mask": torch.arange(COLUMNS, device="cuda") < lengths[:, None],
        "ids": torch.randint(
            VOCABULARY, (ROWS, COLUMNS), generator=torch.Generator("cuda").manual_seed(0), device="cuda"
        ),
        "logprobs": -randn(ROWS, COLUMNS, seed=1).abs(),
        "old_logprobs": -randn(ROWS, COLUMNS, seed=2).abs(),
        "advantages": randn(ROWS, COLUMNS, seed=3),
        "values": randn(ROWS, COLUMNS, seed=4),
        "old_values": randn(ROWS, COLUMNS, seed=5),
        "returns": randn(ROWS, COLUMNS, seed=6),
    }


def flat(found: Any) -> list[Tensor]:
    """All tensors in what an op returns."""
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, dict):
        return [tensor for key in sorted(found) for tensor in flat(found[key])]
    if found is None:
        return []
    if hasattr(found, "_fields"):
        return [tensor for name in found._fields for tensor in flat(getattr(found, name))]
    if hasattr(found, "__dataclass_fields__"):
        return [tensor for name in found.__dataclass_fields__ for tensor in flat(getattr(found, name))]
    return [tensor for part in found for tensor in flat(part)]


def run(op: str, backend: str) -> list[Tensor]:
    """Results and gradients."""
    t = tokens()
    logits = randn(ROWS * COLUMNS, VOCABULARY, seed=7, scale=3).requires_grad_()
    hidden = randn(ROWS * COLUMNS, WIDTH, seed=8).requires_grad_()
    weight = randn(VOCABULARY, WIDTH, seed=9, scale=0.05).requires_grad_()
    ids, mask = t["ids"], t["mask"]
    policy = (t["old_logprobs"], t["advantages"], mask)
    function: Any = getattr(ops, op)
    leaves: list[Tensor] = []
    if op == "gather_logprobs":
        found, leaves = function(logits, ids.flatten(), return_entropy=True, backend=backend), [logits]
    elif op == "linear_logprobs":
        found, leaves = function(hidden, weight, ids.flatten(), backend=backend), [hidden, weight]
    elif op == "linear_cross_entropy":
        found = function(hidden, weight, ids.flatten(), mask.flatten(), backend=backend)
        leaves = [hidden, weight]
    elif op == "logits_ppo_loss":
        found = function(logits.view(ROWS, COLUMNS, -1), ids, *policy, backend=backend)
        leaves = [logits]
    elif op == "linear_ppo_loss":
        found = function(hidden.view(ROWS, COLUMNS, -1), weight, ids, *policy, backend=backend)
        leaves = [hidden, weight]
    elif op == "ppo_loss":
        leaves = [t["logprobs"].requires_grad_()]
        found = function(leaves[0], *policy, backend=backend)
    elif op == "value_loss":
        leaves = [t["values"].requires_grad_()]
        found = function(leaves[0], t["old_values"], t["returns"], mask, backend=backend)
    elif op == "gae":
        found = function(t["advantages"], t["values"], mask, backend=backend)
    elif op == "shaped_gae":
        scores = randn(ROWS, seed=10)
        found = function(scores, t["logprobs"], t["old_logprobs"], t["values"], mask, kl_coef=0.1, backend=backend)
    else:
        assert op == "masked_whiten"
        found = function(t["advantages"], mask, backend=backend)
    results = flat(found)
    if not leaves:
        return results
    first = next(tensor for tensor in results if tensor.requires_grad)
    gradients = torch.autograd.grad(first.sum(), leaves)
    return [tensor.detach() for tensor in (*results, *gradients)]


@pytest.mark.parametrize("op", ops.reference.__all__)
def test_triton_is_the_reference(op: str) -> None:
    found, expected = run(op, "triton"), run(op, "reference")
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-3, atol=1e-4)
