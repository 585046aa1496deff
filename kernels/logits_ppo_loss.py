"""Logits become the gradient of their loss on the GPU, in one read and one write: PPO's loss, and cross-entropy.

One program a row: it reads the row, makes the loss of its token, and writes the gradient over the logits. The second
pass finds the row in the second-level cache: 132 rows of 152k bfloat16 logits are 40 MB, an H100's holds 50. The row's
work is in _softmax_row.py, PPO's formula in _ppo_token.py.

Under TRITON_INTERPRET=1 the same code runs on CPU tensors, which the tests use.
"""

# Triton reads the annotations of a kernel's arguments as their types, so they carry none.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._ppo_token import ppo_token
from rlhf_fast.kernels._rows import aligned, row_layout, rows_are_disjoint
from rlhf_fast.kernels._softmax_row import LOG2E, launch_options, logprob_of, read_row, row_start, write_gradient

PPO_COLUMNS, CROSS_ENTROPY_COLUMNS = 6, 3


@triton.jit
def _write_in_place(
    logits,
    start,
    vocabulary,
    id,
    chosen,
    maximum,
    log2_total,
    entropy,
    g,
    h,
    scale,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # Rows outside the mask have no gradient and were not read. All threads must have read the row before one writes.
    used = (g != 0) | (h != 0)
    tl.debug_barrier()
    write_gradient(
        logits,
        start,
        logits,
        start,
        vocabulary,
        id,
        chosen,
        maximum,
        log2_total,
        entropy,
        g,
        h,
        used,
        scale,
        True,
        THREADS,
        VECTOR,
    )


@triton.jit(do_not_specialize=["rows", "offset", "inner", "outer_stride", "inner_stride"])
def _ppo_kernel(
    logits,
    ids,
    old_logprobs,
    advantages,
    mask,
    weights,  # or None
    ref_logprobs,  # or None
    num_tokens,
    found,  # [6, rows]
    rows,
    offset,
    inner,
    outer_stride,
    inner_stride,
    vocabulary,
    scale,
    clip_low,
    clip_high,
    dual_clip,
    kl_coef,
    entropy_coef,
    DUAL_CLIP: tl.constexpr,
    KL: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = row_start(row, offset, inner, outer_stride, inner_stride)
    id = tl.load(ids + row).to(tl.int64)
    zero = tl.full([], 0.0, tl.float32)
    maximum, log2_total, chosen, logprob, entropy = zero, zero, zero, zero, zero
    loss, g, h, ratio, is_clipped, approx_kl = zero, zero, zero, zero, zero, zero
    if tl.load(mask + row):
        maximum, log2_total, chosen, entropy = read_row(logits, start, vocabulary, id, scale, True, THREADS, VECTOR)
        logprob = logprob_of(chosen, maximum, log2_total, scale)
        weight = zero + 1.0
        if weights is not None:
            weight = tl.load(weights + row)
        ref_logprob = zero
        if ref_logprobs is not None:
            ref_logprob = tl.load(ref_logprobs + row)
        loss, dlogprob, dentropy, ratio, clipped, approx_kl = ppo_token(
            logprob,
            tl.load(old_logprobs + row),
            tl.load(advantages + row),
            weight,
            ref_logprob,
            entropy,
            clip_low,
            clip_high,
            dual_clip,
            kl_coef,
            entropy_coef,
            DUAL_CLIP,
            KL,
        )
        is_clipped = clipped.to(tl.float32)
        g = dlogprob / tl.load(num_tokens)
        h = dentropy / tl.load(num_tokens)
    tl.store(found + row, logprob)
    tl.store(found + rows + row, loss)
    tl.store(found + 2 * rows + row, approx_kl)
    tl.store(found + 3 * rows + row, is_clipped)
    tl.store(found + 4 * rows + row, entropy)
    tl.store(found + 5 * rows + row, ratio)
    _write_in_place(logits, start, vocabulary, id, chosen, maximum, log2_total, entropy, g, h, scale, THREADS, VECTOR)


@triton.jit(do_not_specialize=["rows", "offset", "inner", "outer_stride", "inner_stride"])
def _cross_entropy_kernel(
    logits,
    ids,
    mask,
    weights,  # or None
    num_tokens,
    found,  # [3, rows]
    rows,
    offset,
    inner,
    outer_stride,
    inner_stride,
    vocabulary,
    scale,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = row_start(row, offset, inner, outer_stride, inner_stride)
    id = tl.load(ids + row).to(tl.int64)
    zero = tl.full([], 0.0, tl.float32)
    maximum, log2_total, chosen, logprob, weight, is_largest = zero, zero, zero, zero, zero, zero
    if tl.load(mask + row):
        maximum, log2_total, chosen, _ = read_row(logits, start, vocabulary, id, scale, False, THREADS, VECTOR)
        logprob = logprob_of(chosen, maximum, log2_total, scale)
        is_largest = (chosen == maximum).to(tl.float32)
        weight = zero + 1.0
        if weights is not None:
            weight = tl.load(weights + row)
    tl.store(found + row, logprob)
    tl.store(found + rows + row, -weight * logprob)
    tl.store(found + 2 * rows + row, is_largest)
    g = -weight / tl.load(num_tokens)
    _write_in_place(logits, start, vocabulary, id, chosen, maximum, log2_total, zero, g, zero, scale, THREADS, VECTOR)


@torch.library.custom_op("rlhf_fast::logits_ppo_loss_triton_", mutates_args=("logits",))
def logits_ppo_loss_(
    logits: Tensor,
    ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    ref_logprobs: Tensor | None,
    num_tokens: Tensor,
    temperature: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    kl_estimator: int,
    entropy_coef: float,
) -> Tensor:
    """See rlhf_fast.ops._loss_rows.ppo_rows_. dual_clip 0: none. kl_estimator: 2 or 3. Returns [6, rows] float32."""
    found = logits.new_empty((PPO_COLUMNS, ids.numel()), dtype=torch.float32)
    arguments = (
        ids.contiguous(),
        _per_row(old_logprobs),
        _per_row(advantages),
        mask.contiguous(),
        _per_row(weights),
        _per_row(ref_logprobs),
        num_tokens.float(),
        found,
    )
    options = (clip_low, clip_high, dual_clip, kl_coef, entropy_coef)
    kl = kl_estimator if kl_coef and ref_logprobs is not None else 0
    _launch(_ppo_kernel, logits, arguments, temperature, options, DUAL_CLIP=dual_clip != 0, KL=kl)
    return found


@logits_ppo_loss_.register_fake
def _(logits: Tensor, ids: Tensor, *_: Any) -> Tensor:
    return logits.new_empty((PPO_COLUMNS, ids.numel()), dtype=torch.float32)


@torch.library.custom_op("rlhf_fast::logits_cross_entropy_triton_", mutates_args=("logits",))
def logits_cross_entropy_(
    logits: Tensor, ids: Tensor, mask: Tensor, weights: Tensor | None, num_tokens: Tensor, temperature: float
) -> Tensor:
    """See rlhf_fast.ops._loss_rows.cross_entropy_rows_. Returns [3, rows] float32."""
    found = logits.new_empty((CROSS_ENTROPY_COLUMNS, ids.numel()), dtype=torch.float32)
    arguments = (ids.contiguous(), mask.contiguous(), _per_row(weights), num_tokens.float(), found)
    _launch(_cross_entropy_kernel, logits, arguments, temperature, ())
    return found


@logits_cross_entropy_.register_fake
def _(logits: Tensor, ids: Tensor, *_: Any) -> Tensor:
    return logits.new_empty((CROSS_ENTROPY_COLUMNS, ids.numel()), dtype=torch.float32)


def _per_row(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _launch(
    kernel: Any,
    logits: Tensor,
    arguments: tuple[Any, ...],
    temperature: float,
    options: tuple[float, ...],
    **constants: Any,
) -> None:
    """One program a row; `arguments` end with what the kernel finds, [columns, rows]."""
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"logits_ppo_loss: Triton takes float32, bfloat16 and float16 logits; got {logits.dtype}")
    if not (logits.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(f"logits_ppo_loss: Triton needs logits on a GPU; got {logits.device}")
    rows = arguments[-1].shape[1]
    if rows == 0:
        return
    layout = row_layout(logits)
    if layout is None or not rows_are_disjoint(logits):
        raise ValueError(f"logits' rows must be contiguous and apart in memory; got strides {logits.stride()}")
    with torch.cuda.device_of(logits):
        kernel[(rows,)](
            aligned(logits, layout),
            *arguments,
            rows,
            *layout,
            logits.shape[-1],
            LOG2E / temperature,
            *options,
            **constants,
            **launch_options(logits),
        )
