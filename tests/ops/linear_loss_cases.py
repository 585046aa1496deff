"""What must hold for both losses that start at the hidden states, linear_ppo_loss and linear_cross_entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops import Backend
from tests.ops.op_cases import Normals

H, V = 12, 37
Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def make(rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """hidden [rows, H], the head, and what a loss needs of each token; a third of the tokens are outside the mask."""
    normal = Normals(seed, dtype)
    ids = torch.randint(V, (rows,), generator=normal.generator)
    mask = torch.rand(rows, generator=normal.generator) > 0.3
    tokens = Normals(seed + 1, torch.float64 if dtype == torch.float64 else torch.float32)
    return {
        "hidden": normal(rows, H) / 4,  # log-probs near -3, so that no ratio is beyond float16
        "weight": normal(V, H),
        "bias": normal(V),
        "ids": ids,
        "mask": mask,
        "old_logprobs": tokens(rows) - 3,
        "advantages": tokens(rows),
        "ref_logprobs": tokens(rows) - 3,
        "weights": tokens(rows).abs(),
    }


def ppo(given: dict[str, Tensor], backend: Backend, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    found = ops.linear_ppo_loss(
        **given, kl_coef=0.1, kl_estimator="k3", entropy_coef=0.02, dual_clip=2.0, backend=backend, **options
    )
    return found.policy_loss, found.stats


def cross_entropy(given: dict[str, Tensor], backend: Backend, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    given = {k: x for k, x in given.items() if k not in ("old_logprobs", "advantages", "ref_logprobs")}
    found = ops.linear_cross_entropy(**given, backend=backend, **options)
    return found.loss, found.stats


def run(
    loss: Loss, backend: Backend, given: dict[str, Tensor], *, factor: float = 1.0, **options: Any
) -> dict[str, Tensor]:
    """The loss, its statistics, and the gradients of `factor` times the loss."""
    names = [name for name in ("hidden", "weight", "bias") if name in given]
    leaves = {name: given[name].detach().requires_grad_() for name in names}
    value, stats = loss(given | leaves, backend, **options)
    gradients = torch.autograd.grad(value * factor if factor != 1 else value, list(leaves.values()))
    return {"loss": value.detach(), **stats, **{f"grad_{n}": g for n, g in zip(names, gradients, strict=True)}}
