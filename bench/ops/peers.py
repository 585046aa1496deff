"""Others' formulas for the log-probs of ids from logits, written out: what several benches compare with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def eager(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1).gather(-1, ids[:, None])[:, 0]


def selective_log_softmax(logits: Tensor, ids: Tensor) -> Tensor:
    """TRL's and verl's way to save memory: the chosen logits less the logsumexp, a row at a time."""
    chosen = logits.gather(-1, ids[:, None])[:, 0]
    return chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])


def with_entropy(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """verl's: the entropy is the logsumexp less the mean logit."""
    log_sum = torch.logsumexp(logits, dim=-1)
    mean = (torch.softmax(logits, dim=-1) * logits).sum(dim=-1)
    return logits.gather(-1, ids[:, None])[:, 0] - log_sum, log_sum - mean


class _FromLogsumexp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        log_sum = torch.logsumexp(logits, dim=-1)
        ctx.save_for_backward(logits, ids, log_sum)
        return logits.gather(-1, ids[:, None])[:, 0] - log_sum

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        logits, ids, log_sum = ctx.saved_tensors
        gradient = logits.detach().sub_(log_sum[:, None]).exp_().mul_(-upstream[:, None])
        return gradient.scatter_add_(-1, ids[:, None], upstream[:, None]), None


def from_logsumexp_in_place(logits: Tensor, ids: Tensor) -> Tensor:
    """Liger's GRPO loss: the logsumexp is kept, and the backward pass writes the gradient over the logits."""
    found: Tensor = _FromLogsumexp.apply(logits, ids)
    return found
