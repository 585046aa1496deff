"""KL-shaped rewards with the score on the last token, then GAE."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.config import KLEstimator
from rlhf_fast.ops.reference._common import compute_dtype, inside, kl_terms
from rlhf_fast.ops.reference.gae import gae


def shaped_gae(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    kl_estimator: KLEstimator = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    clip_score: float | None = None,
    last_values: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See rlhf_fast.ops.shaped_gae."""
    dtype = compute_dtype(scores, logprobs, ref_logprobs, values, last_values)
    scores = scores.to(dtype)
    if clip_score is not None:
        scores = scores.clamp(-clip_score, clip_score)
    masked_from_here_on = mask.long().flip(1).cumsum(1).flip(1)
    is_last = mask & (masked_from_here_on == 1)
    rewards = torch.where(is_last, scores[:, None], 0)

    if ref_logprobs is not None:
        difference = inside(mask, logprobs, dtype) - inside(mask, ref_logprobs, dtype)
        rewards = rewards - kl_coef * kl_terms(difference, kl_estimator)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, last_values=last_values)
    return advantages.to(dtype), returns.to(dtype), rewards
