"""Clipped value loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_fast.ops import _checks, reference
from rlhf_fast.ops._dispatch import Backend, Implementation, choose_backend, divisor, load_compiled_ops
from rlhf_fast.ops._types import ValueLoss
from rlhf_fast.ops.reference._common import compute_dtype


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    cliprange_value: float | None = 0.2,
    num_tokens: int | float | Tensor | None = None,
    backend: Backend = "auto",
) -> ValueLoss:
    """0.5 * sum(max((V - R)^2, (clip(V, V_old +- cliprange_value) - R)^2)) / num_tokens over masked tokens.

    The clipped form is that of OpenAI's PPO (baselines, ppo2; Stiennon et al. 2020). Only `values` get a gradient.

    Args:
        values: [B, T] (or any shape that all share), the value model's now.
        old_values: the same shape, those of the rollout.
        returns: the same shape, GAE's.
        mask: the same shape, bool, True for trained tokens.
        cliprange_value: at least 0; None: not clipped.
        num_tokens: masked tokens of the optimiser step over all ranks and micro-batches, so that the losses and
            gradients of its parts add up to the whole's; None: this call's, at least 1.
        backend: see rlhf_fast.ops.

    Returns:
        ValueLoss(loss, stats): loss 0-d, float64 if an input is, else float32. stats["value_clip_fraction"]: share of
        tokens where the clipped error is the larger, with the same divisor.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or number, a backend that there is not.
    """
    _checks.mask("value_loss", mask)
    _checks.per_token("value_loss", mask, values=values, old_values=old_values, returns=returns)
    _checks.limit("value_loss", "cliprange_value", cliprange_value, minimum=0.0)
    _checks.divisor("value_loss", num_tokens)
    dtype = compute_dtype(values, old_values, returns)
    implementation = choose_backend("value_loss", backend, mask.device, dtype)
    if implementation == "reference":
        return reference.value_loss(
            values, old_values, returns, mask, cliprange_value=cliprange_value, num_tokens=num_tokens
        )
    loss, clip_fraction = _compiled(implementation)(
        values,
        old_values,
        returns,
        mask,
        *divisor(num_tokens),
        math.inf if cliprange_value is None else cliprange_value,
    )
    return ValueLoss(loss, {"value_clip_fraction": clip_fraction})


def _compiled(implementation: Implementation) -> Callable[..., tuple[Tensor, Tensor]]:
    if implementation == "cpp":
        load_compiled_ops()
        return torch.ops.rlhf_fast.value_loss
    from rlhf_fast.kernels import value_loss as kernel  # not at the top: a machine may have no Triton

    return kernel.value_loss
