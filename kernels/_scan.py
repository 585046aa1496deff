"""Generalised advantage estimation as an associative scan, which gae and shaped_gae share.

With S_t = gamma * lam * A_t + gamma * V_t, which is all that the token to the left needs to know,

    A_t = S_next + (r_t - V_t)                                       (1)
    S_t = gamma * lam * S_next + gamma * lam * r_t + (gamma - gamma * lam) * V_t

A run of tokens maps the S on its right to the S of its leftmost token, S -> decay * S + shift, and to the A of that
token, S -> slope * S + level. Runs are joined by `_join`. Untrained tokens are the identity on S.
"""

# Triton reads the annotations of a kernel's arguments as their types, so they carry none.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

VECTOR = 4  # numbers that a thread loads at once, 16 bytes in float32
MAX_BLOCK = 1024


@triton.jit
def _join(right_decay, right_shift, right_slope, right_level, decay, shift, slope, level):
    return decay * right_decay, decay * right_shift + shift, slope * right_decay, slope * right_shift + level


@triton.jit
def row_start(row, stride, ALIGNED: tl.constexpr, VECTOR: tl.constexpr):
    # In elements and 64 bits. Multiplying by VECTOR tells the compiler that the row can be loaded by whole vectors.
    start = row * stride
    return start // VECTOR * VECTOR if ALIGNED else start


@triton.jit
def scan_block(rewards, values, inside, is_first, next_state, gamma, decay):
    """Advantages of a block of columns, and the state that the block to the left of it needs.

    rewards and values are 0 outside the mask `inside`; is_first is True for the block's first column.
    """
    identity = tl.where(inside, 0.0, 1.0)
    slope = tl.where(inside, 1.0, 0.0)
    kept = decay * slope + identity
    shift = decay * rewards + (gamma - decay) * values
    kept, shift, slope, level = tl.associative_scan((kept, shift, slope, rewards - values), 0, _join, reverse=True)
    advantages = tl.where(inside, slope * next_state + level, 0.0)
    state = tl.sum(tl.where(is_first, kept * next_state + shift, 0.0), axis=0)
    return advantages, state


def check_inputs(op: str, *inputs: Tensor | None) -> None:
    for x in inputs:
        if x is None:
            continue
        if x.dtype == torch.float64:
            raise TypeError(f"{op}: Triton takes float32, bfloat16 and float16; got {x.dtype}")
        if not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
            raise ValueError(f"{op}: Triton needs tensors on a GPU; got {x.device}")


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor [B, T] with contiguous rows; when T is a multiple of VECTOR, each on a border of whole vectors.

    How a row is loaded decides in which order it is summed. So that depends on T alone, not on where the row lies: a
    row has the same bits in any batch.
    """
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        return tensor.contiguous()
    if tensor.shape[1] % VECTOR != 0:
        return tensor
    aligned = tensor.stride(0) % VECTOR == 0 and tensor.data_ptr() % 16 == 0
    return tensor if aligned else tensor.clone(memory_format=torch.contiguous_format)


def launch_options(columns: int) -> dict[str, int | bool]:
    block = min(MAX_BLOCK, max(32, triton.next_power_of_2(columns)))
    return {
        "ALIGNED": columns % VECTOR == 0,
        "VECTOR": VECTOR,
        "BLOCK": block,
        "num_warps": max(1, block // 128),
        "enable_fp_fusion": True,
    }
