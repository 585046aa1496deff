"""PPO's clipped policy loss, from logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from rlhf_fast.config import KLEstimator
from rlhf_fast.kernels._rows import rows_are_disjoint
from rlhf_fast.ops import _checks, reference
from rlhf_fast.ops._dispatch import Backend, Implementation, choose_backend
from rlhf_fast.ops._loss_rows import KnownGradient, ppo_rows_, ppo_summary
from rlhf_fast.ops._types import PPOLoss
from rlhf_fast.ops.gather_logprobs import gather_logprobs
from rlhf_fast.ops.ppo_loss import ppo_loss
from rlhf_fast.ops.reference._common import IGNORED, compute_dtype, token_count


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
    """`ppo_loss` of `gather_logprobs(logits, ids)`, in one: loss and gradient together, in one read and one write.

    The call writes the gradient over the logits where they require one: a head's output is read once and becomes its
    own gradient, and there is no second tensor of that size. So nothing else may read the logits after the call. An
    operation that saved them for its own backward pass raises autograd's RuntimeError about an inplace operation, and
    so does a second backward pass through this loss. Pass logits.clone() if they are still needed.

    The logits stay as they are, and the gradient takes a copy of them, where they are a leaf or a view of one (they are
    the caller's), where rows share memory or cannot be addressed, and where the call is traced. Without a gradient
    (torch.no_grad, or logits that require none) they are only read.

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
    dtype = compute_dtype(logits, old_logprobs, advantages, weights, ref_logprobs)
    implementation = choose_backend("logits_ppo_loss", backend, mask.device, dtype)
    if implementation == "triton" and dtype == torch.float64:
        raise TypeError("logits_ppo_loss: backend 'triton' computes in float32; got float64 arguments")
    arguments = (logits, ids, old_logprobs, advantages, mask)
    if implementation == "reference":
        return reference.logits_ppo_loss(*arguments, temperature=temperature, **policy)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return _without_gradient(implementation, *arguments, temperature, policy)
    return _with_gradient(implementation, *arguments, temperature, policy, dtype)


def _without_gradient(
    implementation: Implementation,
    logits: Tensor,
    ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    temperature: float,
    policy: dict[str, Any],
) -> PPOLoss:
    logprobs, entropy = gather_logprobs(
        logits,
        torch.where(mask, ids, IGNORED),
        temperature=temperature,
        return_entropy=True,
        ignore_index=IGNORED,
        backend=implementation,
    )
    result = ppo_loss(logprobs, old_logprobs, advantages, mask, entropy=entropy, **policy)
    return result._replace(stats=result.stats | {"logprobs": logprobs})


def _with_gradient(
    implementation: Implementation,
    logits: Tensor,
    ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    temperature: float,
    policy: dict[str, Any],
    dtype: torch.dtype,
) -> PPOLoss:
    count = token_count(mask, policy.pop("num_tokens"), torch.float64 if implementation == "cpp" else torch.float32)
    weights, ref_logprobs = policy.pop("weights"), policy.pop("ref_logprobs")
    overwritten = _can_be_overwritten(logits)
    gradient = logits.detach() if overwritten else logits.detach().clone(memory_format=torch.contiguous_format)
    found = ppo_rows_(
        implementation,
        gradient,
        ids,
        old_logprobs.detach(),
        advantages.detach(),
        mask,
        None if weights is None else weights.detach().expand(mask.shape),
        None if ref_logprobs is None else ref_logprobs.detach(),
        count,
        temperature=temperature,
        **policy,
    )
    if overwritten:
        torch.autograd.graph.increment_version(logits)  # whoever saved them gets an error, not a wrong gradient
    result = ppo_summary(found, mask, count, dtype, compute_dtype(logits))
    return result._replace(policy_loss=KnownGradient.apply(logits, gradient, result.policy_loss, overwritten))


def _can_be_overwritten(logits: Tensor) -> bool:
    traced = torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or type(logits) is not Tensor
    if traced:  # nothing may change behind the tracer's back
        return False
    owner = logits if logits._base is None else logits._base
    return not owner.is_leaf and rows_are_disjoint(logits)
