"""Generalised advantage estimation, one column at a time from the right."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops.reference._common import compute_dtype, inside


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See rlhf_fast.ops.gae."""
    dtype = compute_dtype(rewards, values, last_values)
    rewards, values = inside(mask, rewards, dtype), inside(mask, values, dtype)

    # Value and advantage of the next masked token; the columns between are stepped over.
    next_advantage = values.new_zeros(mask.shape[0])
    next_value = torch.zeros_like(next_advantage) if last_values is None else last_values.to(dtype)
    advantages = torch.zeros_like(values)
    columns = []
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        columns.append(advantage)
    if columns:
        advantages = inside(mask, torch.stack(columns[::-1], dim=1), dtype)
    return advantages, advantages + values
