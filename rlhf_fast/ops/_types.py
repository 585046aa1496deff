"""What the losses return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PPOLoss(NamedTuple):
    """Policy loss, value loss (None without value arguments) and detached statistics.

    The losses are 0-d tensors. Every statistic is a tensor, so that reading none costs no host sync. All are sums over
    masked tokens divided by num_tokens, and so add up across micro-batches and ranks; only ratio_max combines by max.
    Keys: approx_kl, clip_fraction, ratio_max; entropy where it is known; value_clip_fraction with value arguments;
    logprobs [B, T] from logits_ppo_loss and linear_ppo_loss.
    """

    policy_loss: Tensor
    value_loss: Tensor | None
    stats: dict[str, Tensor]


class ValueLoss(NamedTuple):
    """Value loss (0-d) and its detached statistics (value_clip_fraction)."""

    loss: Tensor
    stats: dict[str, Tensor]


class CrossEntropyLoss(NamedTuple):
    """Loss (0-d) and detached statistics, tensors all of them, so that reading none costs no host sync.

    Keys: logprobs [...], exactly 0 outside the mask; accuracy, the part of the tokens than which no other had a larger
    logit. Loss and accuracy are sums over masked tokens divided by num_tokens, and so add up across micro-batches.
    """

    loss: Tensor
    stats: dict[str, Tensor]
