"""PPO's clipped policy loss over tokens on the GPU: loss, statistics and gradients in one pass.

One program a block of tokens writes its gradients and its sums; the sums of all blocks are added up in their order
afterwards, so that a second run gives the same bits. The formula is in _ppo_token.py.
"""

# Triton reads the annotations of a kernel's arguments as their types, so they carry none.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._ppo_token import ppo_token
from rlhf_fast.kernels._token_sums import BLOCK, LAUNCH, chain, check, per_token, token_count, token_values


@triton.jit
def _kernel(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    weights,  # or None
    ref_logprobs,  # or None
    entropy,  # or None
    num_tokens,
    grad_logprobs,  # or None
    grad_entropy,  # or None
    sums,  # [5, blocks]: loss, approx_kl, clipped, entropy, the largest ratio
    tokens,
    clip_low,
    clip_high,
    dual_clip,
    kl_coef,
    entropy_coef,
    DUAL_CLIP: tl.constexpr,
    KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    place = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = place < tokens
    inside = tl.load(mask + place, mask=exists, other=0) != 0
    logprob = token_values(logprobs, place, exists, inside)
    old_logprob = token_values(old_logprobs, place, exists, inside)
    advantage = token_values(advantages, place, exists, inside)
    weight = inside.to(tl.float32)
    if weights is not None:
        weight = token_values(weights, place, exists, inside)
    ref_logprob = logprob
    if ref_logprobs is not None:
        ref_logprob = token_values(ref_logprobs, place, exists, inside)
    h = tl.zeros([BLOCK], tl.float32)
    if entropy is not None:
        h = token_values(entropy, place, exists, inside)
    loss, dlogprob, dentropy, ratio, clipped, approx_kl = ppo_token(
        logprob,
        old_logprob,
        advantage,
        weight,
        ref_logprob,
        h,
        clip_low,
        clip_high,
        dual_clip,
        kl_coef,
        entropy_coef,
        DUAL_CLIP,
        KL,
    )
    count = tl.load(num_tokens)
    if grad_logprobs is not None:
        tl.store(grad_logprobs + place, dlogprob / count, mask=exists)
    if grad_entropy is not None:
        tl.store(grad_entropy + place, dentropy / count, mask=exists)
    blocks = tl.num_programs(0)
    tl.store(sums + block, tl.sum(loss, axis=0))
    tl.store(sums + blocks + block, tl.sum(approx_kl, axis=0))
    tl.store(sums + 2 * blocks + block, tl.sum(clipped.to(tl.float32), axis=0))
    tl.store(sums + 3 * blocks + block, tl.sum(h, axis=0))
    tl.store(sums + 4 * blocks + block, tl.max(tl.where(inside, ratio, 0.0), axis=0))


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    num_tokens: Tensor | None,
    number: float | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    kl_estimator: int,
    entropy_coef: float,
) -> tuple[Tensor, Tensor]:
    """The loss (0-d) and approx_kl, clip_fraction, entropy, ratio_max [4], float32. See rlhf_fast.ops.ppo_loss.

    All per-token arguments have mask's shape. The divisor is num_tokens (0-d), else number, else the masked tokens.
    """
    want = torch.is_grad_enabled()
    loss, stats, _, _ = _forward(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        weights,
        ref_logprobs,
        entropy,
        num_tokens,
        number,
        clip_low,
        clip_high,
        dual_clip,
        kl_coef,
        kl_estimator,
        entropy_coef,
        want and logprobs.requires_grad,
        want and entropy is not None and entropy.requires_grad,
    )
    return loss, stats


@torch.library.custom_op("rlhf_fast::ppo_loss_triton", mutates_args=())
def _forward(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    num_tokens: Tensor | None,
    number: float | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    kl_estimator: int,
    entropy_coef: float,
    want_logprobs: bool,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, stats, the loss's gradients by logprobs and by entropy, of no elements where not wanted)"""
    check("ppo_loss", mask, logprobs, old_logprobs, advantages, weights, ref_logprobs, entropy)
    count = token_count(mask, num_tokens, number)
    grad_logprobs, grad_entropy = _gradients(logprobs, want_logprobs, want_entropy)
    tokens = mask.numel()
    blocks = triton.cdiv(tokens, BLOCK)
    sums = torch.zeros(5, max(blocks, 1), device=mask.device)
    if blocks:
        with torch.cuda.device_of(mask):
            _kernel[(blocks,)](
                per_token(logprobs),
                per_token(old_logprobs),
                per_token(advantages),
                mask.contiguous(),
                per_token(weights),
                per_token(ref_logprobs) if kl_coef else None,
                per_token(entropy),
                count,
                grad_logprobs if want_logprobs else None,
                grad_entropy if want_entropy else None,
                sums,
                tokens,
                clip_low,
                clip_high,
                dual_clip,
                kl_coef,
                entropy_coef,
                DUAL_CLIP=dual_clip != 0,
                KL=kl_estimator if kl_coef and ref_logprobs is not None else 0,
                BLOCK=BLOCK,
                **LAUNCH,
            )
    totals = sums[:4].sum(dim=1) / count
    # A comparison passes over NaN: the sum of squared log-ratios tells whether there was one.
    ratio_max = torch.where(totals[1].isnan(), totals[1], sums[4].max())
    return totals[0].clone(), torch.cat([totals[1:], ratio_max[None]]), grad_logprobs, grad_entropy


def _gradients(logprobs: Tensor, *wanted: bool) -> tuple[Tensor, Tensor]:
    first, second = (logprobs.new_empty(logprobs.shape if w else (0,), dtype=torch.float32) for w in wanted)
    return first, second


@_forward.register_fake
def _forward_fake(logprobs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    want_logprobs, want_entropy = arguments[-2:]
    new = logprobs.new_empty
    return new((), dtype=torch.float32), new(4, dtype=torch.float32), *_gradients(logprobs, want_logprobs, want_entropy)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.op = "ppo_loss"
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    by_logprobs, by_entropy = chain(ctx, grad_loss)
    return by_logprobs, *(None,) * 5, by_entropy, *(None,) * 10


_forward.register_autograd(_differentiate, setup_context=_save)
