"""Log-probs of given ids and the entropy, from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops.reference._common import compute_dtype


def gather_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See rlhf_fast.ops.gather_logprobs. inplace_backward changes nothing here; ids out of range give NaN."""
    vocabulary = logits.shape[-1]
    kept = ids != ignore_index
    logits = torch.where(kept[..., None], logits.to(compute_dtype(logits)), 0)
    log_probs = torch.log_softmax(logits / temperature, dim=-1)

    chosen = log_probs.gather(-1, ids.long().clamp(0, vocabulary - 1)[..., None])[..., 0]
    chosen = torch.where((ids >= 0) & (ids < vocabulary), chosen, torch.nan)
    logprobs = torch.where(kept, chosen, 0)
    if not return_entropy:
        return logprobs

    # A token of probability 0 has log-prob -inf: replacing it first keeps 0 * -inf out of the sum and of its gradient.
    finite = torch.where(log_probs == -torch.inf, 0, log_probs)
    entropy = -(log_probs.exp() * finite).sum(dim=-1)
    return logprobs, torch.where(kept, entropy, 0)
