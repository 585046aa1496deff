"""Mean 0 and deviation 1 over masked tokens, of all ranks if asked."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_fast.ops.reference._common import compute_dtype, inside


def masked_whiten(
    x: Tensor,
    mask: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    shift_mean: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """See rlhf_fast.ops.masked_whiten."""
    dtype = compute_dtype(x)
    x = inside(mask, x, dtype)
    count, mean, squares = _moments(x, mask)
    if group is not None:
        count, mean, squares = merge_moments(count, mean, squares, group)
    whitened = (x - mean) * torch.rsqrt(squares / count.clamp(min=1) + eps)
    return inside(mask, whitened if shift_mean else whitened + mean, dtype)


def _moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations (M2) of this process; x is 0 outside the mask."""
    count = mask.sum().to(x.dtype)
    mean = x.sum() / count.clamp(min=1)
    return count, mean, inside(mask, x - mean, x.dtype).square().sum()


def merge_moments(
    count: Tensor, mean: Tensor, squares: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """The same moments over all ranks (Chan, Golub and LeVeque 1983): the mean is never squared, so nothing cancels."""
    mine = torch.stack([count, mean, squares])
    ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, mine, group=group)
    counts, means, all_squares = torch.stack(ranks).unbind(dim=1)
    total = counts.sum()
    mean = (counts * means).sum() / total.clamp(min=1)
    return total, mean, all_squares.sum() + (counts * (means - mean).square()).sum()
