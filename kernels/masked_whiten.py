"""Masked whitening on the GPU: partial moments, their merge, and the normalisation. Two passes over the numbers.

The numbers are cut into at most PARTS parts by their count alone, and the parts are merged in one fixed tree (Chan,
Golub and LeVeque 1983): the same numbers give the same bits. Sums are float32 within a block, around the block's own
mean, and float64 between blocks. Under TRITON_INTERPRET=1 the same code runs on CPU tensors, which the tests use.
"""

# Triton reads the annotations of a kernel's arguments as their types, so they carry none.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
PARTS = 512
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def _merge(count, mean, squares, other_count, other_mean, other_squares):
    total = count + other_count
    part = other_count / tl.where(total > 0, total, 1.0)
    difference = other_mean - mean
    return total, mean + difference * part, squares + other_squares + difference * difference * count * part


@triton.jit(do_not_specialize=["size", "part_size"])
def _partial_moments_kernel(partials, x, mask, size, part_size, BLOCK: tl.constexpr):
    part = tl.program_id(0).to(tl.int64)
    count = tl.zeros([], tl.float64)
    mean = tl.zeros([], tl.float64)
    squares = tl.zeros([], tl.float64)
    for first in range(0, part_size, BLOCK):
        place = part * part_size + first + tl.arange(0, BLOCK)
        inside = tl.load(mask + place, mask=place < size, other=0) != 0
        v = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        n = tl.sum(inside.to(tl.float32), axis=0)
        divisor = tl.maximum(n, 1.0)
        rough = tl.sum(v, axis=0) / divisor
        # The mean's own rounding is left in the deviations' sum: taken out of it there, nothing is lost.
        deviation = tl.where(inside, v - rough, 0.0)
        rest = tl.sum(deviation, axis=0)
        block_squares = tl.sum(deviation * deviation, axis=0) - rest * (rest / divisor)
        block_mean = rough.to(tl.float64) + (rest / divisor).to(tl.float64)
        count, mean, squares = _merge(count, mean, squares, n.to(tl.float64), block_mean, block_squares.to(tl.float64))
    tl.store(partials + 3 * part, count)
    tl.store(partials + 3 * part + 1, mean)
    tl.store(partials + 3 * part + 2, squares)


@triton.jit(do_not_specialize=["parts"])
def _merge_kernel(moments, partials, parts, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)
    there = part < parts
    count = tl.load(partials + 3 * part, mask=there, other=0.0)
    mean = tl.load(partials + 3 * part + 1, mask=there, other=0.0)
    squares = tl.load(partials + 3 * part + 2, mask=there, other=0.0)
    count, mean, squares = tl.reduce((count, mean, squares), 0, _merge)
    tl.store(moments, count)
    tl.store(moments + 1, mean)
    tl.store(moments + 2, squares)


@triton.jit(do_not_specialize=["size"])
def _normalise_kernel(out, x, mask, moments, size, eps, SHIFT_MEAN: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(moments)
    mean = tl.load(moments + 1)
    variance = tl.load(moments + 2) / tl.where(count > 1, count, 1.0)
    scale = 1.0 / tl.sqrt(variance.to(tl.float32) + eps)
    # The mean in two float32 parts: x - high is exact where cancellation would lose the low part.
    high = mean.to(tl.float32)
    low = (mean - high.to(tl.float64)).to(tl.float32)
    inside = tl.load(mask + place, mask=place < size, other=0) != 0
    v = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    whitened = (v - high - low) * scale
    if not SHIFT_MEAN:
        whitened += high
    tl.store(out + place, tl.where(inside, whitened, 0.0), mask=place < size)


@torch.library.custom_op("rlhf_fast::masked_moments_triton", mutates_args=())
def masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    """[3] float64: count, mean and sum of squared deviations of x where the mask is True."""
    x, mask = _contiguous(x, mask)
    moments = x.new_empty(3, dtype=torch.float64)
    part_size = max(1, triton.cdiv(x.numel(), PARTS * BLOCK)) * BLOCK
    parts = triton.cdiv(x.numel(), part_size)
    partials = x.new_empty((parts, 3), dtype=torch.float64)
    with torch.cuda.device_of(x):
        if parts > 0:
            _partial_moments_kernel[(parts,)](partials, x, mask, x.numel(), part_size, BLOCK=BLOCK, **OPTIONS)
        _merge_kernel[(1,)](moments, partials, parts, PARTS=PARTS, num_warps=4)
    return moments


@masked_moments.register_fake
def _moments_fake(x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty(3, dtype=torch.float64)


@torch.library.custom_op("rlhf_fast::masked_normalise_triton", mutates_args=())
def masked_normalise(x: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool, eps: float) -> Tensor:
    """x's shape, float32: (x - mean) / sqrt(squares / count + eps), plus the mean unless shift_mean; 0 outside."""
    x, mask = _contiguous(x, mask)
    out = torch.empty_like(x, dtype=torch.float32)
    blocks = triton.cdiv(x.numel(), BLOCK)
    if blocks > 0:
        with torch.cuda.device_of(x):
            _normalise_kernel[(blocks,)](
                out, x, mask, moments.contiguous(), x.numel(), eps, SHIFT_MEAN=shift_mean, BLOCK=BLOCK, **OPTIONS
            )
    return out


@masked_normalise.register_fake
def _normalise_fake(x: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def _contiguous(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float64:
        raise TypeError("masked_whiten: Triton takes float32, bfloat16 and float16 numbers; got torch.float64")
    if not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(f"masked_whiten: Triton needs tensors on a GPU; got {x.device}")
    return x.contiguous(), mask.contiguous().view(torch.uint8)
