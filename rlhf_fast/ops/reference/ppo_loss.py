"""Clipped policy loss with its additions, and the value loss of a shared trunk."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.config import KLEstimator
from rlhf_fast.ops._types import PPOLoss
from rlhf_fast.ops.reference._common import MAX_LOG_RATIO, compute_dtype, inside, kl_terms, token_count
from rlhf_fast.ops.reference.value_loss import value_loss


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k2",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    num_tokens: int | float | Tensor | None = None,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    cliprange_value: float | None = 0.2,
) -> PPOLoss:
    """See rlhf_fast.ops.ppo_loss."""
    dtype = compute_dtype(logprobs, old_logprobs, advantages, weights, ref_logprobs, entropy)
    count = token_count(mask, num_tokens, dtype)
    logprobs = inside(mask, logprobs, dtype)
    advantages = inside(mask, advantages.detach(), dtype)

    log_ratio = (logprobs - inside(mask, old_logprobs.detach(), dtype)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - cliprange, 1 + (cliprange if cliprange_high is None else cliprange_high))
    unclipped, clipped = -advantages * ratio, -advantages * clipped_ratio
    loss = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    stats = {
        "approx_kl": (0.5 * log_ratio.square()).sum() / count,
        "clip_fraction": (clipped > unclipped).sum() / count,
        "ratio_max": torch.cat([inside(mask, ratio, dtype).flatten(), ratio.new_zeros(1)]).max(),
    }

    if ref_logprobs is not None and kl_coef:
        loss = loss + kl_coef * kl_terms(logprobs - inside(mask, ref_logprobs.detach(), dtype), kl_estimator)
    if entropy is not None:
        entropy = inside(mask, entropy, dtype)
        loss = loss - entropy_coef * entropy
        stats["entropy"] = entropy.sum() / count
    if weights is not None:
        loss = loss * inside(mask, weights.detach(), dtype)
    policy_loss = loss.sum() / count

    shared = None
    if values is not None and old_values is not None and returns is not None:
        shared, value_stats = value_loss(
            values, old_values, returns, mask, cliprange_value=cliprange_value, num_tokens=num_tokens
        )
        stats |= value_stats
    return PPOLoss(policy_loss, shared, {name: stat.detach() for name, stat in stats.items()})
