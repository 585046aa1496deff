"""PPO's clipped policy loss, from hidden states and the head."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from rlhf_fast.config import KLEstimator
from rlhf_fast.ops import _checks, reference
from rlhf_fast.ops._dispatch import Backend, Implementation, choose_backend
from rlhf_fast.ops._head_chunks import HeadChunks, Rows, fake_gradients, with_gradients
from rlhf_fast.ops._loss_rows import PPO_COLUMNS, ppo_rows_, ppo_summary
from rlhf_fast.ops._types import PPOLoss
from rlhf_fast.ops.reference._common import compute_dtype, token_count


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

    The gradients are made together with the loss, chunk by chunk, with three matrix products in all. The backward pass
    hands them on, or scales them in place where the loss's own gradient is not 1: after that a second backward pass is
    an error. Without a gradient (torch.no_grad) it is one product.

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
    head_dtype = compute_dtype(hidden, weight, bias)
    dtype = compute_dtype(hidden, weight, bias, old_logprobs, advantages, weights, ref_logprobs)
    implementation = choose_backend("linear_ppo_loss", backend, mask.device, dtype)
    if implementation == "reference":
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
    count = token_count(mask, num_tokens, torch.float64 if implementation == "cpp" else torch.float32)
    head = (hidden, weight, bias)
    found, *gradients = _rows(
        hidden.detach(),
        weight.detach(),
        ids,
        old_logprobs.detach(),
        advantages.detach(),
        mask,
        None if bias is None else bias.detach(),
        None if weights is None else weights.detach().expand(mask.shape),
        None if ref_logprobs is None else ref_logprobs.detach(),
        count,
        temperature,
        softcap,
        scale,
        cliprange,
        cliprange_high,
        dual_clip,
        kl_coef,
        kl_estimator,
        entropy_coef,
        implementation,
        [torch.is_grad_enabled() and x is not None and x.requires_grad for x in head],
    )
    result = ppo_summary(found, mask, count, dtype, head_dtype)
    return result._replace(policy_loss=with_gradients(result.policy_loss, head, gradients))


@torch.library.custom_op("rlhf_fast::_linear_ppo_loss", mutates_args=())
def _rows(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    ref_logprobs: Tensor | None,
    num_tokens: Tensor,
    temperature: float,
    softcap: float | None,
    scale: float,
    cliprange: float,
    cliprange_high: float | None,
    dual_clip: float | None,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    implementation: str,
    gradients: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `ppo_rows_` finds of all rows, and the gradients of hidden, weight and bias that are asked for."""
    head = HeadChunks(
        hidden, weight, bias, mask, temperature=temperature, softcap=softcap, scale=scale, gradients=gradients
    )
    found = num_tokens.new_zeros(PPO_COLUMNS, mask.numel())

    def kernel(rows: Rows, logits: Tensor) -> None:
        found[:, rows] = ppo_rows_(
            cast(Implementation, implementation),
            logits,
            ids.reshape(-1)[rows],
            old_logprobs.reshape(-1)[rows],
            advantages.reshape(-1)[rows],
            mask.reshape(-1)[rows],
            None if weights is None else weights.reshape(-1)[rows],
            None if ref_logprobs is None else ref_logprobs.reshape(-1)[rows],
            num_tokens,
            temperature=head.temperature,
            cliprange=cliprange,
            cliprange_high=cliprange_high,
            dual_clip=dual_clip,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            entropy_coef=entropy_coef,
        )

    head.run(kernel)
    return (found, *head.gradients())


@_rows.register_fake
def _rows_fake(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, _, mask, bias, _, _, num_tokens, *_, gradients = arguments
    return (num_tokens.new_empty(PPO_COLUMNS, mask.numel()), *fake_gradients(hidden, weight, bias, gradients))
