"""Rows of logits that become the gradient of their loss, in place: what logits_ppo_loss and the linear losses share.

Each function reads and writes logits [..., V] once and returns what it found of each row as [columns, rows] numbers,
float64 from C++ and float32 from Triton, 0 outside the mask. Summed over all rows at once they give the losses and
statistics: chunks are put side by side first, so that no sum depends on the chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops._dispatch import Implementation, load_compiled_ops
from rlhf_fast.ops._types import CrossEntropyLoss, PPOLoss

PPO_COLUMNS = 6  # logprob, loss, approx_kl, whether clipped, entropy, ratio
CROSS_ENTROPY_COLUMNS = 3  # logprob, loss, whether no logit is larger than the id's


def ppo_rows_(
    implementation: Implementation,
    logits: Tensor,
    ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    ref_logprobs: Tensor | None,
    num_tokens: Tensor,
    *,
    temperature: float,
    cliprange: float,
    cliprange_high: float | None,
    dual_clip: float | None,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
) -> Tensor:
    """Overwrites logits with the gradient of (sum of the rows' policy losses) / num_tokens. Formula: `ppo_loss`.

    Args:
        implementation: "cpp" or "triton".
        logits: [..., V], of any dtype that the implementation takes, rows contiguous and apart in memory.
        ids, old_logprobs, advantages, mask, weights, ref_logprobs: [...]. A row outside the mask is not read.
        num_tokens: 0-d, on the logits' device.

    Returns:
        [6, rows]: logprob, loss (not divided), approx_kl, whether clipped, entropy, ratio.
    """
    return _operator(implementation, "logits_ppo_loss_")(
        logits,
        ids,
        old_logprobs,
        advantages,
        mask,
        weights,
        ref_logprobs,
        num_tokens,
        temperature,
        1 - cliprange,
        1 + (cliprange if cliprange_high is None else cliprange_high),
        dual_clip or 0.0,
        kl_coef,
        int(kl_estimator[1]),
        entropy_coef,
    )


def cross_entropy_rows_(
    implementation: Implementation,
    logits: Tensor,
    ids: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    num_tokens: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Overwrites logits with the gradient of (sum of -weight * logprob of the rows' ids) / num_tokens.

    Arguments as in `ppo_rows_`.

    Returns:
        [3, rows]: logprob, loss = -weight * logprob (not divided), whether no logit of the row is larger than the id's.
    """
    return _operator(implementation, "logits_cross_entropy_")(logits, ids, mask, weights, num_tokens, temperature)


def _operator(implementation: Implementation, name: str) -> Callable[..., Tensor]:
    if implementation == "cpp":
        load_compiled_ops()
        return getattr(torch.ops.rlhf_fast, f"_{name}")
    from rlhf_fast.kernels import logits_ppo_loss as kernel  # not at the top: a machine may have no Triton

    return getattr(kernel, name)


def ppo_summary(found: Tensor, mask: Tensor, num_tokens: Tensor, dtype: torch.dtype, real: torch.dtype) -> PPOLoss:
    """The loss and the statistics from what `ppo_rows_` found of all rows.

    Args:
        found: [6, rows]. mask: gives the log-probs' shape. num_tokens: 0-d.
        dtype: of the loss and the statistics. real: of the log-probs.
    """
    sums = found[1:5].sum(dim=1, dtype=torch.float64) / num_tokens  # each row of four by one thread, in one order
    loss, approx_kl, clip_fraction, entropy = sums.to(dtype).unbind()
    stats = {
        "approx_kl": approx_kl,
        "clip_fraction": clip_fraction,
        "ratio_max": torch.cat([found[5], found.new_zeros(1)]).max().to(dtype),
        "entropy": entropy,
        "logprobs": found[0].reshape(mask.shape).to(real),
    }
    return PPOLoss(loss, None, stats)


def cross_entropy_summary(
    found: Tensor, mask: Tensor, num_tokens: Tensor, dtype: torch.dtype, real: torch.dtype
) -> CrossEntropyLoss:
    """The loss and the statistics from what `cross_entropy_rows_` found of all rows; arguments as in `ppo_summary`."""
    loss, accuracy = (found[1:].sum(dim=1, dtype=torch.float64) / num_tokens).to(dtype).unbind()
    return CrossEntropyLoss(loss, {"logprobs": found[0].reshape(mask.shape).to(real), "accuracy": accuracy})


class KnownGradient(torch.autograd.Function):
    """loss, whose gradient with respect to x is known: the backward pass hands it on, times the loss's own gradient.

    `overwritten` says that the gradient stands where x stood. It is then scaled in place and handed on once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor, loss: Tensor, overwritten: bool) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.overwritten = overwritten
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        if not ctx.overwritten:
            return gradient * grad_loss, None, None, None
        if gradient.is_cuda or grad_loss.item() != 1:
            gradient.mul_(grad_loss)
        torch.autograd.graph.increment_version(gradient)  # a second backward pass is an error, not a wrong gradient
        return gradient, None, None, None
