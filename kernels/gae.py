"""Generalised advantage estimation on the GPU: one launch, a program for each row, a block of columns at a time.

The scan: kernels/_scan.py. Under TRITON_INTERPRET=1 the same code runs on CPU tensors, which the tests use.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._scan import check_inputs, launch_options, row_start, rows_of, scan_block

INTEGERS = ["rewards_stride", "values_stride", "mask_stride", "columns"]


@triton.jit(do_not_specialize=INTEGERS)
def _kernel(
    advantages,
    returns,
    rewards,
    values,
    mask,
    last_values,  # or None
    rewards_stride,
    values_stride,
    mask_stride,
    columns,
    gamma,
    decay,
    ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rewards += row_start(row, rewards_stride, ALIGNED, VECTOR)
    values += row_start(row, values_stride, ALIGNED, VECTOR)
    mask += row_start(row, mask_stride, ALIGNED, VECTOR)
    out = row_start(row, columns, ALIGNED, VECTOR)
    state = tl.zeros([], tl.float32)
    if last_values is not None:
        state = gamma * tl.load(last_values + row).to(tl.float32)
    blocks = tl.cdiv(columns, BLOCK)
    for block in range(0, blocks):
        place = tl.arange(0, BLOCK)
        column = (blocks - 1 - block) * BLOCK + place
        there = column < row_start(1, columns, ALIGNED, VECTOR)
        inside = tl.load(mask + column, mask=there, other=0) != 0
        r = tl.where(inside, tl.load(rewards + column, mask=there, other=0.0).to(tl.float32), 0.0)
        v = tl.where(inside, tl.load(values + column, mask=there, other=0.0).to(tl.float32), 0.0)
        a, state = scan_block(r, v, inside, place == 0, state, gamma, decay)
        tl.store(advantages + out + column, a, mask=there)
        tl.store(returns + out + column, a + v, mask=there)


@torch.library.custom_op("rlhf_fast::gae_triton", mutates_args=())
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, last_values: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), not differentiable. See rlhf_fast.ops.gae."""
    check_inputs("gae", rewards, values, last_values)
    advantages, returns = _outputs(mask)
    rewards, values, mask = rows_of(rewards), rows_of(values), rows_of(mask)
    rows, columns = mask.shape
    if mask.numel() > 0:
        with torch.cuda.device_of(values):
            _kernel[(rows,)](
                advantages,
                returns,
                rewards,
                values,
                mask.view(torch.uint8),
                None if last_values is None else last_values.contiguous(),
                rewards.stride(0),
                values.stride(0),
                mask.stride(0),
                columns,
                gamma,
                gamma * lam,
                **launch_options(columns),
            )
    return advantages, returns


@gae.register_fake
def _fake(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, last_values: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _outputs(mask)


def _outputs(mask: Tensor) -> tuple[Tensor, Tensor]:
    return mask.new_empty(mask.shape, dtype=torch.float32), mask.new_empty(mask.shape, dtype=torch.float32)
