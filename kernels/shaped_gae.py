"""KL shaping, score, advantages and returns on the GPU: one launch, a program for each row.

The scan: kernels/_scan.py. Under TRITON_INTERPRET=1 the same code runs on CPU tensors, which the tests use.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._scan import check_inputs, launch_options, row_start, rows_of, scan_block

INTEGERS = ["logprobs_stride", "ref_stride", "values_stride", "mask_stride", "columns"]


@triton.jit
def _expm1_less(x):
    # exp(x) - 1 - x without cancellation: near 0 by its series x^2 / 2 * (1 + x / 3 * (1 + x / 4 * (...))).
    series = tl.full(x.shape, 1.0, x.dtype)
    for i in tl.static_range(16):
        series = 1.0 + x * (1.0 / (18 - i)) * series
    return tl.where(tl.abs(x) < 0.5, 0.5 * x * x * series, tl.exp(x) - 1.0 - x)


@triton.jit
def _kl(difference, ESTIMATOR: tl.constexpr):
    kl = difference
    if ESTIMATOR == 2:
        kl = 0.5 * difference * difference
    if ESTIMATOR == 3:  # minimum and maximum would drop a NaN
        kl = _expm1_less(tl.where(difference > 20.0, -20.0, tl.where(difference < -20.0, 20.0, -difference)))
    return kl


@triton.jit(do_not_specialize=INTEGERS)
def _kernel(
    advantages,
    returns,
    rewards,
    scores,
    logprobs,
    ref_logprobs,  # or None
    values,
    mask,
    last_values,  # or None
    logprobs_stride,
    ref_stride,
    values_stride,
    mask_stride,
    columns,
    kl_coef,
    clip_score,
    gamma,
    decay,
    ESTIMATOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logprobs += row_start(row, logprobs_stride, ALIGNED, VECTOR)
    values += row_start(row, values_stride, ALIGNED, VECTOR)
    mask += row_start(row, mask_stride, ALIGNED, VECTOR)
    out = row_start(row, columns, ALIGNED, VECTOR)
    if ref_logprobs is not None:
        ref_logprobs += row_start(row, ref_stride, ALIGNED, VECTOR)
    score = tl.load(scores + row).to(tl.float32)
    score = tl.where(score > clip_score, clip_score, tl.where(score < -clip_score, -clip_score, score)).to(tl.float32)
    state = tl.zeros([], tl.float32)
    if last_values is not None:
        state = gamma * tl.load(last_values + row).to(tl.float32)
    scored = False
    blocks = tl.cdiv(columns, BLOCK)
    for block in range(0, blocks):
        place = tl.arange(0, BLOCK)
        column = (blocks - 1 - block) * BLOCK + place
        there = column < row_start(1, columns, ALIGNED, VECTOR)
        inside = tl.load(mask + column, mask=there, other=0) != 0
        v = tl.where(inside, tl.load(values + column, mask=there, other=0.0).to(tl.float32), 0.0)
        last = tl.max(tl.where(inside, place, -1), axis=0)
        r = tl.where((place == last) & (not scored), score, 0.0).to(tl.float32)
        scored = scored | (last >= 0)
        if ref_logprobs is not None:
            p = tl.where(inside, tl.load(logprobs + column, mask=there, other=0.0).to(tl.float32), 0.0)
            q = tl.where(inside, tl.load(ref_logprobs + column, mask=there, other=0.0).to(tl.float32), 0.0)
            r = tl.where(inside, r - kl_coef * _kl(p - q, ESTIMATOR), 0.0).to(tl.float32)
        a, state = scan_block(r, v, inside, place == 0, state, gamma, decay)
        tl.store(rewards + out + column, r, mask=there)
        tl.store(advantages + out + column, a, mask=there)
        tl.store(returns + out + column, a + v, mask=there)


@torch.library.custom_op("rlhf_fast::shaped_gae_triton", mutates_args=())
def shaped_gae(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor,
    mask: Tensor,
    kl_coef: float,
    kl_estimator: int,
    gamma: float,
    lam: float,
    clip_score: float | None,
    last_values: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(advantages, returns, rewards), not differentiable. See rlhf_fast.ops.shaped_gae; kl_estimator is 1, 2 or 3."""
    check_inputs("shaped_gae", scores, logprobs, ref_logprobs, values, last_values)
    advantages, returns, rewards = _outputs(mask)
    logprobs, values, mask = rows_of(logprobs), rows_of(values), rows_of(mask)
    ref_logprobs = None if ref_logprobs is None else rows_of(ref_logprobs)
    rows, columns = mask.shape
    if mask.numel() > 0:
        with torch.cuda.device_of(values):
            _kernel[(rows,)](
                advantages,
                returns,
                rewards,
                scores.contiguous(),
                logprobs,
                ref_logprobs,
                values,
                mask.view(torch.uint8),
                None if last_values is None else last_values.contiguous(),
                logprobs.stride(0),
                0 if ref_logprobs is None else ref_logprobs.stride(0),
                values.stride(0),
                mask.stride(0),
                columns,
                kl_coef,
                math.inf if clip_score is None else clip_score,
                gamma,
                gamma * lam,
                ESTIMATOR=kl_estimator,
                **launch_options(columns),
            )
    return advantages, returns, rewards


@shaped_gae.register_fake
def _fake(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor,
    mask: Tensor,
    kl_coef: float,
    kl_estimator: int,
    gamma: float,
    lam: float,
    clip_score: float | None,
    last_values: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(mask)


def _outputs(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    advantages, returns, rewards = (mask.new_empty(mask.shape, dtype=torch.float32) for _ in range(3))
    return advantages, returns, rewards
