"""PPO's clipped policy loss, from logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf_fast.config import KLEstimator
from rlhf_fast.ops import _checks, reference
from rlhf_fast.ops._dispatch import REFERENCE_ONLY, Backend, choose_backend
from rlhf_fast.ops._types import PPOLoss


def logits_ppo_loss(
    logits: Tensor,
    ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
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
    """`ppo_loss` of `gather_logprobs(logits, ids)`, in one: loss and gradient together.

    A backend may write the gradient over the logits during the call: when they require a gradient, they are this
    call's, and nothing else may read them before or in the backward pass.

    Args:
        logits: [B, T, V] (or [..., V] with the shape of mask before V), float; the state before token t.
        ids: [B, T] int64 or int32, the tokens; not looked at outside the mask.
        old_logprobs, advantages, mask: as in `ppo_loss`.
        temperature: above 0, what the logits are divided by; the rollout's.
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
    _checks.policy("logits_ppo_loss", mask, old_logprobs=old_logprobs, advantages=advantages, **policy)
    _checks.logits("logits_ppo_loss", logits)
    _checks.shape("logits_ppo_loss", "logits", logits, [*mask.shape, logits.shape[-1]], "mask's and V")
    _checks.ids("logits_ppo_loss", ids, mask.shape, "like mask", mask.device)
    _checks.same_device("logits_ppo_loss", "logits", logits, mask.device)
    _checks.ids_in_range("logits_ppo_loss", ids, logits.shape[-1], mask, "masked out")
    _checks.temperature("logits_ppo_loss", temperature)
    choose_backend("logits_ppo_loss", backend, REFERENCE_ONLY, mask.device)
    return reference.logits_ppo_loss(logits, ids, old_logprobs, advantages, mask, temperature=temperature, **policy)
