"""ppo_loss from hidden states and a linear head."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from rlhf_fast.ops._types import PPOLoss
from rlhf_fast.ops.reference._common import IGNORED
from rlhf_fast.ops.reference.linear_logprobs import linear_logprobs
from rlhf_fast.ops.reference.ppo_loss import ppo_loss


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    **policy: Any,
) -> PPOLoss:
    """See rlhf_fast.ops.linear_ppo_loss; `policy` are ppo_loss's arguments."""
    found = linear_logprobs(
        hidden,
        weight,
        torch.where(mask, ids, IGNORED),
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        scale=scale,
        return_entropy=True,
        ignore_index=IGNORED,
    )
    logprobs, entropy = cast(tuple[Tensor, Tensor], found)
    result = ppo_loss(logprobs, old_logprobs, advantages, mask, entropy=entropy, **policy)
    return result._replace(stats=result.stats | {"logprobs": logprobs.detach()})
