"""Clipped value loss."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops._types import ValueLoss
from rlhf_fast.ops.reference._common import compute_dtype, inside, token_count


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    cliprange_value: float | None = 0.2,
    num_tokens: int | float | Tensor | None = None,
) -> ValueLoss:
    """See rlhf_fast.ops.value_loss."""
    dtype = compute_dtype(values, old_values, returns)
    count = token_count(mask, num_tokens, dtype)
    values = inside(mask, values, dtype)
    old_values = inside(mask, old_values.detach(), dtype)
    returns = inside(mask, returns.detach(), dtype)

    error = (values - returns).square()
    if cliprange_value is None:
        return ValueLoss(0.5 * error.sum() / count, {"value_clip_fraction": error.new_zeros(())})
    near_old = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    clipped_error = (near_old - returns).square()
    loss = 0.5 * torch.maximum(error, clipped_error).sum() / count
    # Outside the mask all three are 0, so that neither error is larger there.
    return ValueLoss(loss, {"value_clip_fraction": (clipped_error > error).sum() / count})
