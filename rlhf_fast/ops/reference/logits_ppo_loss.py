"""ppo_loss from logits."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from rlhf_fast.ops._types import PPOLoss
from rlhf_fast.ops.reference._common import IGNORED
from rlhf_fast.ops.reference.gather_logprobs import gather_logprobs
from rlhf_fast.ops.reference.ppo_loss import ppo_loss


def logits_ppo_loss(
    logits: Tensor,
    ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    **policy: Any,
) -> PPOLoss:
    """See rlhf_fast.ops.logits_ppo_loss; `policy` are ppo_loss's arguments."""
    found = gather_logprobs(
        logits,
        torch.where(mask, ids, IGNORED),
        temperature=temperature,
        return_entropy=True,
        ignore_index=IGNORED,
    )
    logprobs, entropy = cast(tuple[Tensor, Tensor], found)
    result = ppo_loss(logprobs, old_logprobs, advantages, mask, entropy=entropy, **policy)
    return result._replace(stats=result.stats | {"logprobs": logprobs.detach()})
