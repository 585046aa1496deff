"""Others' formulas for log-probs from logits and for advantages, written out: what several benches compare with."""

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


def scan_by_column(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """DeepSpeed-Chat's and TRL's advantages and returns: a column at a time from the right, in Python."""
    last, columns = rewards.new_zeros(len(rewards)), []
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        last = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * last
        columns.append(last)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def scan_by_doubling(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """The same without a loop over columns: runs of 1, 2, 4, ... tokens are joined."""
    advantages = rewards - values
    advantages[:, :-1] += gamma * values[:, 1:]
    span = 1
    while span < rewards.shape[1]:
        longer = advantages.clone()
        longer[:, :-span] += (gamma * lam) ** span * advantages[:, span:]
        advantages, span = longer, 2 * span
    return advantages, advantages + values
