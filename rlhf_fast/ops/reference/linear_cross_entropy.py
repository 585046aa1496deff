"""Cross-entropy from hidden states and a linear head."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from rlhf_fast.ops._types import CrossEntropyLoss
from rlhf_fast.ops.reference._common import IGNORED, compute_dtype, inside, token_count
from rlhf_fast.ops.reference.linear_logprobs import CHUNK_ELEMENTS, head_logits, linear_logprobs


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    weights: Tensor | None = None,
    num_tokens: int | float | Tensor | None = None,
) -> CrossEntropyLoss:
    """See rlhf_fast.ops.linear_cross_entropy."""
    ids = torch.where(mask, ids, IGNORED)
    logprobs = cast(
        Tensor,
        linear_logprobs(hidden, weight, ids, bias=bias, softcap=softcap, scale=scale, ignore_index=IGNORED),
    )
    dtype = compute_dtype(logprobs, weights)
    count = token_count(mask, num_tokens, dtype)
    losses = -logprobs if weights is None else -logprobs * inside(mask, weights.detach(), dtype)
    right = _likeliest(hidden, weight, ids, bias, softcap, scale)
    stats = {"logprobs": logprobs.detach(), "accuracy": right.sum().to(dtype) / count}
    return CrossEntropyLoss(losses.sum() / count, stats)


@torch.no_grad()
def _likeliest(
    hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None, softcap: float | None, scale: float
) -> Tensor:
    """Whether no logit is larger than the id's, [N]; False for ignored ids."""
    dtype = compute_dtype(hidden, weight, bias)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    found = []
    size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    rows = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    for chunk, chosen in zip(rows.split(size), ids.reshape(-1).split(size), strict=True):
        logits = head_logits(chunk, weight, bias, softcap, scale)
        largest = logits.gather(-1, chosen.long().clamp(min=0)[:, None])[:, 0] == logits.amax(dim=-1)
        found.append(largest & (chosen != IGNORED))
    return torch.cat(found)
