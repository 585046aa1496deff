"""PPO's clipped policy loss, from log-probs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.config import KLEstimator
from rlhf_fast.ops import _checks, reference
from rlhf_fast.ops._dispatch import Backend, Implementation, choose_backend, divisor, load_compiled_ops
from rlhf_fast.ops._types import PPOLoss
from rlhf_fast.ops.reference._common import compute_dtype
from rlhf_fast.ops.value_loss import value_loss


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
    backend: Backend = "auto",
) -> PPOLoss:
    """PPO's clipped loss (Schulman et al. 2017, arXiv:1707.06347) with the usual additions.

        r    = exp(logprobs - old_logprobs), the difference clamped to +-20
        L_t  = max(-A * r, -A * clip(r, 1 - cliprange, 1 + cliprange_high))
        L_t  = min(L_t, -dual_clip * A) where A < 0 and dual_clip is given (Ye et al. 2020, arXiv:1912.09729)
        L_t += kl_coef * kl(logprobs - ref_logprobs) - entropy_coef * entropy
        policy_loss = sum over masked tokens of weights * L_t, divided by num_tokens

    Other methods are arguments: GRPO's sequence means and truncated importance sampling are `weights`, Dr. GRPO's
    constant is `num_tokens`, GSPO's sequence ratio is length-mean log-probs in [B, 1]. Gradients go to `logprobs`,
    `entropy` and `values` only.

    Args:
        logprobs: [B, T] (or any shape that all per-token arguments share), the policy's now.
        old_logprobs: the same shape, those that the rollout is held to.
        advantages: the same shape.
        mask: the same shape, bool, True for trained tokens.
        cliprange: at least 0, how far the ratio counts below 1, and above it too without cliprange_high.
        cliprange_high: at least 0.
        dual_clip: above 1.
        weights: mask's shape, or 1 in place of a size: [B, 1] weighs rows.
        ref_logprobs: the same shape as logprobs; wanted when kl_coef is not 0.
        kl_coef: weight of the KL to the reference in the loss, at least 0.
        kl_estimator: "k2" or "k3", see `shaped_gae`. k1 is refused: its expected gradient is zero.
        entropy: the same shape, of the policy now.
        entropy_coef: weight of the entropy bonus; wants `entropy` when it is not 0.
        num_tokens: masked tokens of the optimiser step over all ranks and micro-batches, so that the losses and
            gradients of its parts add up to the whole's; None: this call's, at least 1.
        values, old_values, returns, cliprange_value: `value_loss`'s, for a value head on a shared trunk: all or none.
            It is not weighted by `weights`, nor added to policy_loss.
        backend: see rlhf_fast.ops.

    Returns:
        PPOLoss(policy_loss, value_loss, stats); value_loss is None without the value arguments. Losses are 0-d, float64
        if an input is, else float32. stats, all with the divisor num_tokens and unweighted: approx_kl, the mean of
        0.5 * (log-ratio)^2; clip_fraction, the share of tokens where the clipped term is the larger; ratio_max, the
        largest ratio (0 without tokens; combine by max); entropy and value_clip_fraction where given.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or number, k1, an argument that another one needs, a backend
        that there is not.
    """
    policy: dict[str, Any] = {
        "cliprange": cliprange,
        "cliprange_high": cliprange_high,
        "dual_clip": dual_clip,
        "weights": weights,
        "ref_logprobs": ref_logprobs,
        "kl_coef": kl_coef,
        "kl_estimator": kl_estimator,
        "entropy_coef": entropy_coef,
        "num_tokens": num_tokens,
    }
    _checks.policy("ppo_loss", mask, old_logprobs=old_logprobs, advantages=advantages, **policy)
    _checks.per_token("ppo_loss", mask, logprobs=logprobs, entropy=entropy)
    if entropy_coef and entropy is None:
        raise ValueError(f"ppo_loss: entropy_coef {entropy_coef:g} needs entropy, which is None")
    value_arguments = {"values": values, "old_values": old_values, "returns": returns}
    missing = [name for name, tensor in value_arguments.items() if tensor is None]
    if missing and len(missing) < len(value_arguments):
        raise ValueError(f"ppo_loss: values, old_values and returns go together; {' and '.join(missing)} missing")
    _checks.per_token("ppo_loss", mask, **value_arguments)
    _checks.limit("ppo_loss", "cliprange_value", cliprange_value, minimum=0.0)
    if values is not None and old_values is not None and returns is not None:
        value, value_stats = value_loss(
            values,
            old_values,
            returns,
            mask,
            cliprange_value=cliprange_value,
            num_tokens=num_tokens,
            backend=backend,
        )
    else:
        value, value_stats = None, {}
    dtype = compute_dtype(logprobs, old_logprobs, advantages, weights, ref_logprobs, entropy)
    implementation = choose_backend("ppo_loss", backend, mask.device, dtype)
    if implementation == "reference":
        result = reference.ppo_loss(logprobs, old_logprobs, advantages, mask, entropy=entropy, **policy)
        return result._replace(value_loss=value, stats=result.stats | value_stats)
    policy_loss, found = _compiled(implementation)(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        None if weights is None else weights.expand(mask.shape),
        ref_logprobs if kl_coef else None,
        entropy,
        *divisor(num_tokens),
        1 - cliprange,
        1 + (cliprange if cliprange_high is None else cliprange_high),
        dual_clip or 0.0,
        kl_coef,
        int(kl_estimator[1]),
        entropy_coef,
    )
    stats = dict(zip(("approx_kl", "clip_fraction", "entropy", "ratio_max"), found.unbind(), strict=True))
    if entropy is None:
        del stats["entropy"]
    return PPOLoss(policy_loss, value, stats | value_stats)


def _compiled(implementation: Implementation) -> Callable[..., tuple[Tensor, Tensor]]:
    if implementation == "cpp":
        load_compiled_ops()
        return torch.ops.rlhf_fast.ppo_loss
    from rlhf_fast.kernels import ppo_loss as kernel  # not at the top: a machine may have no Triton

    return kernel.ppo_loss
