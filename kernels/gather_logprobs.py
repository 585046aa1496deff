"""Log-probs at given ids and the entropy on the GPU: logits are read once forward, and read and written once backward.

One program a row; the row's work is in _softmax_row.py.

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
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from rlhf_fast.kernels._rows import RowLayout, aligned, row_layout, rows_are_disjoint
from rlhf_fast.kernels._softmax_row import LOG2E, launch_options, logprob_of, read_row, row_start, write_gradient


@triton.jit(do_not_specialize=["offset", "inner", "outer_stride", "inner_stride", "ignore_index"])
def _forward_kernel(
    logits,
    ids,
    logprobs,
    entropy,
    stats,
    offset,
    inner,
    outer_stride,
    inner_stride,
    vocabulary,
    ignore_index,
    scale,
    ENTROPY: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    id = tl.load(ids + row)
    if id == ignore_index:
        tl.store(logprobs + row, 0.0)
        tl.store(stats + 2 * row, 0.0)
        tl.store(stats + 2 * row + 1, 0.0)
        if ENTROPY:
            tl.store(entropy + row, 0.0)
        return

    start = row_start(row, offset, inner, outer_stride, inner_stride)
    maximum, log2_total, chosen, row_entropy = read_row(logits, start, vocabulary, id, scale, ENTROPY, THREADS, VECTOR)
    tl.store(logprobs + row, logprob_of(chosen, maximum, log2_total, scale))
    tl.store(stats + 2 * row, maximum)
    tl.store(stats + 2 * row + 1, log2_total)
    if ENTROPY:
        tl.store(entropy + row, row_entropy)


@triton.jit(do_not_specialize=["offset", "inner", "outer_stride", "inner_stride", "ignore_index"])
def _backward_kernel(
    grad_logits,  # may be the logits
    grad_logprobs,  # or None
    grad_entropy,  # or None
    logits,
    ids,
    entropy,
    stats,
    offset,
    inner,
    outer_stride,
    inner_stride,
    vocabulary,
    ignore_index,
    scale,
    SAME_LAYOUT: tl.constexpr,  # the gradient's rows lie where the logits' do; else they are contiguous
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    id = tl.load(ids + row).to(tl.int64)
    g = tl.full([], 0.0, tl.float32)
    h = g
    row_entropy = g
    if grad_logprobs is not None:
        g = tl.load(grad_logprobs + row)
    if grad_entropy is not None:
        h = tl.load(grad_entropy + row)
        row_entropy = tl.load(entropy + row)
    # A row without a gradient is not read: whatever it holds, NaN too, its gradient is 0.
    used = (id != ignore_index) & ((g != 0) | (h != 0))
    start = row_start(row, offset, inner, outer_stride, inner_stride)
    chosen = tl.load(logits + start + id, mask=used & (id >= 0) & (id < vocabulary), other=0.0).to(tl.float32)
    tl.debug_barrier()  # in place: all threads must have read it before one writes
    write_gradient(
        grad_logits,
        start if SAME_LAYOUT else row * vocabulary,
        logits,
        start,
        vocabulary,
        id,
        chosen,
        tl.load(stats + 2 * row),
        tl.load(stats + 2 * row + 1),
        row_entropy,
        g,
        h,
        used,
        scale,
        SAME_LAYOUT,
        THREADS,
        VECTOR,
    )


def gather_logprobs(
    logits: Tensor,
    ids: Tensor,
    temperature: float,
    return_entropy: bool,
    ignore_index: int,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor]:
    """Log-softmax of logits / temperature at ids, and the entropy; differentiable. See rlhf_fast.ops.gather_logprobs.

    Args:
        logits: [..., V] float32, bfloat16 or float16 on a GPU.
        ids: [...] int64 or int32. Out of range: the log-prob is NaN and has no gradient.

    Returns:
        (logprobs [...], entropy [...] or [0] unless asked for), float32.
    """
    logprobs, entropy, _ = _forward(logits, ids, temperature, return_entropy, ignore_index, inplace_backward)
    return logprobs, entropy


@torch.library.custom_op("rlhf_fast::gather_logprobs_triton", mutates_args=())
def _forward(
    logits: Tensor, ids: Tensor, temperature: float, return_entropy: bool, ignore_index: int, inplace_backward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropy, stats: the largest logit and log2 of the sum of 2^t of each row [rows, 2])"""
    logits, layout = _with_rows(logits)
    logprobs, entropy, stats = _outputs(logits, ids, return_entropy)
    rows = ids.numel()
    if rows > 0:
        with torch.cuda.device_of(logits):
            _forward_kernel[(rows,)](
                aligned(logits, layout),
                ids.contiguous(),
                logprobs,
                entropy,
                stats,
                *layout,
                logits.shape[-1],
                ignore_index,
                LOG2E / temperature,
                ENTROPY=return_entropy,
                **launch_options(logits),
            )
    return logprobs, entropy, stats


@_forward.register_fake
def _forward_fake(
    logits: Tensor, ids: Tensor, temperature: float, return_entropy: bool, ignore_index: int, inplace_backward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(logits, ids, return_entropy)


def _outputs(logits: Tensor, ids: Tensor, return_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = logits.new_empty(ids.shape, dtype=torch.float32)
    entropy = logits.new_empty(ids.shape if return_entropy else (0,), dtype=torch.float32)
    return logprobs, entropy, logits.new_empty((ids.numel(), 2), dtype=torch.float32)


@torch.library.custom_op("rlhf_fast::gather_logprobs_triton_backward", mutates_args=())
def _backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    entropy: Tensor,
    stats: Tensor,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _launch_backward(grad, grad_logprobs, grad_entropy, logits, ids, entropy, stats, temperature, ignore_index)
    return grad


@_backward.register_fake
def _backward_fake(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    entropy: Tensor,
    stats: Tensor,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _launch_backward(
    grad: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    entropy: Tensor,
    stats: Tensor,
    temperature: float,
    ignore_index: int,
) -> None:
    logits, layout = _with_rows(logits)
    rows = ids.numel()
    if rows == 0:
        return
    with torch.cuda.device_of(logits):
        same_layout = row_layout(grad) == layout
        _backward_kernel[(rows,)](
            aligned(grad, layout) if same_layout else grad,
            None if grad_logprobs is None else grad_logprobs.contiguous(),
            None if grad_entropy is None else grad_entropy.contiguous(),
            aligned(logits, layout),
            ids.contiguous(),
            entropy,
            stats,
            *layout,
            logits.shape[-1],
            ignore_index,
            LOG2E / temperature,
            SAME_LAYOUT=same_layout,
            **launch_options(logits),
        )


def backward_(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    stats: Tensor,
    entropy: Tensor,
    temperature: float,
    ignore_index: int,
) -> None:
    """The gradient over the logits themselves, for ops that made these and need them no more."""
    _launch_backward(logits, grad_logprobs, grad_entropy, logits, ids, entropy, stats, temperature, ignore_index)


def forward(
    logits: Tensor, ids: Tensor, temperature: float, return_entropy: bool, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropy, stats) for `backward_`; not differentiable."""
    return _forward(logits, ids, temperature, return_entropy, ignore_index, False)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, ids, ctx.temperature, return_entropy, ctx.ignore_index, ctx.inplace_backward = inputs
    _, entropy, stats = output
    ctx.save_for_backward(logits, ids, entropy, stats)
    ctx.mark_non_differentiable(*([stats] if return_entropy else [entropy, stats]))
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: None) -> tuple[Any, ...]:
    logits, ids, entropy, stats = ctx.saved_tensors
    saved = (grad_logprobs, grad_entropy, logits, ids, entropy, stats, ctx.temperature, ctx.ignore_index)
    # While a graph is traced nothing may be overwritten behind the tracer's back: the permission is not used.
    traced = is_in_torch_dispatch_mode() or type(logits) not in (Tensor, torch.nn.Parameter)
    if ctx.inplace_backward and not traced and rows_are_disjoint(logits):
        grad = logits.detach()
        _launch_backward(grad, *saved)
        torch.autograd.graph.increment_version(logits)  # whoever else saved them gets an error, not a wrong gradient
    else:
        grad = _backward(*saved)
    return grad, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _with_rows(logits: Tensor) -> tuple[Tensor, RowLayout]:
    """The logits, copied if their rows cannot be addressed, and where their rows are."""
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"gather_logprobs: Triton takes float32, bfloat16 and float16 logits; got {logits.dtype}")
    if not (logits.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(f"gather_logprobs: Triton needs logits on a GPU; got {logits.device}")
    layout = row_layout(logits)
    if layout is not None:
        return logits, layout
    return logits.contiguous(), RowLayout(0, max(logits.numel() // logits.shape[-1], 1), 0, logits.shape[-1])
