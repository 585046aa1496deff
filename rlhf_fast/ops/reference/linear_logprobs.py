"""gather_logprobs of a linear head, a few rows at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_fast.ops.reference._common import compute_dtype
from rlhf_fast.ops.reference.gather_logprobs import gather_logprobs

CHUNK_ELEMENTS = 2**23  # logits that exist at once: 32 MB in fp32


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
) -> Tensor | tuple[Tensor, Tensor]:
    """See rlhf_fast.ops.linear_logprobs. With several chunks, each one's logits are made again in the backward pass."""
    dtype = compute_dtype(hidden, weight, bias)
    # A NaN in an ignored row must not reach the weight's gradient, which sums over rows.
    rows = torch.where((ids != ignore_index)[..., None], hidden.to(dtype), 0).reshape(-1, hidden.shape[-1])
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)

    def chunk(rows: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        logits = head_logits(rows, weight, bias, softcap, scale)
        found = gather_logprobs(
            logits, ids, temperature=temperature, return_entropy=return_entropy, ignore_index=ignore_index
        )
        return found if isinstance(found, tuple) else (found,)

    size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    chunks = list(zip(rows.split(size), ids.reshape(-1).split(size), strict=True))
    if len(chunks) == 1:
        parts = [chunk(*chunks[0], weight, bias)]
    else:
        parts = [checkpoint(chunk, *c, weight, bias, use_reentrant=False, preserve_rng_state=False) for c in chunks]
    outputs = [torch.cat(pieces).reshape(ids.shape) for pieces in zip(*parts, strict=True)]
    return (outputs[0], outputs[1]) if return_entropy else outputs[0]


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> Tensor:
    """softcap(scale * (hidden @ weight.T + bias)), of any softcap, in the inputs' dtype."""
    logits = F.linear(hidden, weight, bias) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
