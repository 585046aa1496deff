"""PPO's clipped policy loss, from hidden states and the head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf_fast.config import KLEstimator
from rlhf_fast.ops import _checks, reference
from rlhf_fast.ops._dispatch import REFERENCE_ONLY, Backend, choose_backend
from rlhf_fast.ops._types import PPOLoss


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
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k2",
    entropy_coef: float = 0.0,
    num_tokens: int | float | Tensor | None = None,
    backend: Backend = "auto",
) -> PPOLoss:
    """`ppo_loss` of `linear_logprobs(hidden, weight, ids)`, in one: the logits are never in memory as a whole.

    Under ZeRO-3 call it inside the nn.Module that owns `weight`, so that the weight is there.

    Args:
        hidden: [B, T, H] (or [..., H] with the shape of mask before H), the state before token t.
        weight: [V, H], the head; gets a gradient.
        ids: [B, T] int64 or int32, the tokens; not looked at outside the mask.
        old_logprobs, advantages, mask: as in `ppo_loss`.
        bias, temperature, softcap, scale: the head's, as in `linear_logprobs`.
        cliprange, ..., num_tokens: as in `ppo_loss`. The entropy is that of the tempered distribution.
        backend: see rlhf_fast.ops.

    Returns:
        PPOLoss(policy_loss, None, stats): ppo_loss's statistics, entropy among them, and stats["logprobs"] [B, T], the
        policy's log-probs now, exactly 0 outside the mask.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or number, k1, ids out of range on the CPU (on a GPU the
        loss is NaN), an argument that another one needs, a backend that there is not.
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
    _checks.policy("linear_ppo_loss", mask, old_logprobs=old_logprobs, advantages=advantages, **policy)
    _checks.head("linear_ppo_loss", hidden, weight, bias, softcap, scale)
    _checks.shape("linear_ppo_loss", "hidden", hidden, [*mask.shape, weight.shape[1]], "mask's and weight's H")
    _checks.same_device("linear_ppo_loss", "hidden", hidden, mask.device)
    _checks.ids("linear_ppo_loss", ids, mask.shape, "like mask", mask.device)
    _checks.ids_in_range("linear_ppo_loss", ids, weight.shape[0], mask, "masked out")
    _checks.temperature("linear_ppo_loss", temperature)
    choose_backend("linear_ppo_loss", backend, REFERENCE_ONLY, mask.device)
    return reference.linear_ppo_loss(
        hidden,
        weight,
        ids,
        old_logprobs,
        advantages,
        mask,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        scale=scale,
        **policy,
    )
