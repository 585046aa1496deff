"""The clipped value loss over tokens on the GPU: loss, share of clipped tokens and gradient in one pass.

One program a block of tokens; the sums of all blocks are added up in their order afterwards, so that a second run gives
the same bits. The formula is rlhf_fast.ops.value_loss's.
"""

# Triton reads the annotations of a kernel's arguments as their types, so they carry none.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._token_sums import BLOCK, LAUNCH, chain, check, per_token, token_count, token_values


@triton.jit
def _kernel(
    values,
    old_values,
    returns,
    mask,
    num_tokens,
    grad_values,  # or None
    sums,  # [2, blocks]: loss, clipped
    tokens,
    cliprange_value,  # infinity: not clipped
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    place = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = place < tokens
    inside = tl.load(mask + place, mask=exists, other=0) != 0
    value = token_values(values, place, exists, inside)
    old_value = token_values(old_values, place, exists, inside)
    target = token_values(returns, place, exists, inside)

    low, high = old_value - cliprange_value, old_value + cliprange_value
    near_old = tl.where(value > high, high, tl.where(value < low, low, value))
    d, clipped_d = value - target, near_old - target
    error, clipped_error = d * d, clipped_d * clipped_d
    # At a tie each side gets half of the derivative, and the ends of a clamp count as inside: as autograd has it.
    from_clipped = tl.where((value > high) | (value < low), 0.0, clipped_d)
    is_clipped = clipped_error > error
    gradient = tl.where(is_clipped, from_clipped, tl.where(error > clipped_error, d, 0.5 * (d + from_clipped)))
    loss = 0.5 * tl.where(is_clipped, clipped_error, error)
    if grad_values is not None:
        tl.store(grad_values + place, gradient / tl.load(num_tokens), mask=exists)
    tl.store(sums + block, tl.sum(loss, axis=0))
    tl.store(sums + tl.num_programs(0) + block, tl.sum(is_clipped.to(tl.float32), axis=0))


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    num_tokens: Tensor | None,
    number: float | None,
    cliprange_value: float,
) -> tuple[Tensor, Tensor]:
    """The loss and value_clip_fraction, both 0-d float32. See rlhf_fast.ops.value_loss.

    All per-token arguments have mask's shape. The divisor is num_tokens (0-d), else number, else the masked tokens.
    """
    want = torch.is_grad_enabled() and values.requires_grad
    loss, clip_fraction, _ = _forward(values, old_values, returns, mask, num_tokens, number, cliprange_value, want)
    return loss, clip_fraction


@torch.library.custom_op("rlhf_fast::value_loss_triton", mutates_args=())
def _forward(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    num_tokens: Tensor | None,
    number: float | None,
    cliprange_value: float,
    want_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, value_clip_fraction, the loss's gradient, of no elements where not wanted)"""
    check("value_loss", mask, values, old_values, returns)
    count = token_count(mask, num_tokens, number)
    gradient = values.new_empty(values.shape if want_values else (0,), dtype=torch.float32)
    tokens = mask.numel()
    blocks = triton.cdiv(tokens, BLOCK)
    sums = torch.zeros(2, max(blocks, 1), device=mask.device)
    if blocks:
        with torch.cuda.device_of(mask):
            _kernel[(blocks,)](
                per_token(values),
                per_token(old_values),
                per_token(returns),
                mask.contiguous(),
                count,
                gradient if want_values else None,
                sums,
                tokens,
                cliprange_value,
                BLOCK=BLOCK,
                **LAUNCH,
            )
    totals = sums.sum(dim=1) / count
    return totals[0].clone(), totals[1].clone(), gradient


@_forward.register_fake
def _forward_fake(values: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    new = values.new_empty
    gradient = new(values.shape if arguments[-1] else (0,), dtype=torch.float32)
    return new((), dtype=torch.float32), new((), dtype=torch.float32), gradient


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.op = "value_loss"
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return *chain(ctx, grad_loss), *(None,) * 7


_forward.register_autograd(_differentiate, setup_context=_save)
