"""Log-probs at given ids and the entropy on the GPU: logits are read once forward, and read and written once backward.

One program a row. Online softmax (Milakov and Gimelshein 2018) over tiles in which each thread holds whole 16-byte
vectors with a maximum and a sum of its own: one rescaling for eight bf16 logits, nothing exchanged until the end.
Formulas: csrc/cpu/gather_logprobs.h. A row's result does not depend on the other rows.

Under TRITON_INTERPRET=1 the same code runs on CPU tensors, which the tests use.
"""

# Triton reads the annotations of a kernel's arguments as their types, so they carry none.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import math
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from rlhf_fast.kernels._rows import RowLayout, aligned, row_layout, rows_are_disjoint

LOG2E = math.log2(math.e)
LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def _row_start(row, offset, inner, outer_stride, inner_stride):
    # In elements, and in 64 bits, as rows times vocabulary passes 2^31. Two levels of strides: logits[:, :-1].
    row = row.to(tl.int64)
    return offset + row // inner * outer_stride + row % inner * inner_stride


@triton.jit
def _add(x, largest, total, weighted, scale, ENTROPY: tl.constexpr):
    # Takes x [THREADS, VECTOR] into the sums so far [THREADS]: of 2^t, and of 2^t * t, with t = (x - largest) * scale.
    # As long as all is -inf, 0 takes the place of the maximum (-inf - -inf would be NaN) and the sums stay 0.
    x = x.to(tl.float32)
    maximum = tl.maximum(largest, tl.max(x, axis=1))
    finite = tl.where(maximum == -float("inf"), 0.0, maximum)
    shift = (largest - finite) * scale
    factor = tl.exp2(shift)
    t = (x - finite[:, None]) * scale
    e = tl.exp2(t)
    if ENTROPY:
        weighted = tl.where(factor == 0, 0.0, (weighted + shift * total) * factor)
        weighted += tl.sum(tl.where(e == 0, 0.0, e * t), axis=1)
    total = total * factor + tl.sum(e, axis=1)
    return maximum, total, weighted


@triton.jit
def _add_all(logits, start, end, scale, ENTROPY: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    places = tl.arange(0, THREADS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    largest = tl.full([THREADS], -float("inf"), tl.float32)
    total = tl.zeros([THREADS], tl.float32)
    weighted = tl.zeros([THREADS], tl.float32)
    for first in range(0, end, THREADS * VECTOR):
        x = tl.load(logits + start + first + places, mask=first + places < end, other=-float("inf"))
        largest, total, weighted = _add(x, largest, total, weighted, scale, ENTROPY)
    return largest, total, weighted


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

    start = _row_start(row, offset, inner, outer_stride, inner_stride)
    body = vocabulary // VECTOR * VECTOR
    # Which thread adds which logits depends on the vocabulary alone, not on where the row happens to lie: a row has the
    # same bits in any batch. Multiplying by VECTOR tells the compiler that these rows can be loaded by whole vectors.
    if start % VECTOR == 0:
        whole = start // VECTOR * VECTOR
        largest, total, weighted = _add_all(logits, whole, body, scale, ENTROPY, THREADS, VECTOR)
    else:
        largest, total, weighted = _add_all(logits, start, body, scale, ENTROPY, THREADS, VECTOR)
    if body < vocabulary:
        column = body + tl.arange(0, THREADS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        x = tl.load(logits + start + column, mask=column < vocabulary, other=-float("inf"))
        largest, total, weighted = _add(x, largest, total, weighted, scale, ENTROPY)

    maximum = tl.max(largest, axis=0)
    shift = (largest - tl.where(maximum == -float("inf"), 0.0, maximum)) * scale
    factor = tl.exp2(shift)
    row_total = tl.sum(total * factor, axis=0)
    log2_total = tl.log2(row_total)
    valid = (id >= 0) & (id < vocabulary)
    chosen = tl.load(logits + start + id, mask=valid, other=float("nan")).to(tl.float32)
    tl.store(logprobs + row, ((chosen - maximum) * scale - log2_total) * LN2)
    tl.store(stats + 2 * row, maximum)
    tl.store(stats + 2 * row + 1, log2_total)
    if ENTROPY:
        row_weighted = tl.sum(tl.where(factor == 0, 0.0, (weighted + shift * total) * factor), axis=0)
        tl.store(entropy + row, (log2_total - row_weighted / row_total) * LN2)


@triton.jit
def _split(start, vocabulary, VECTOR: tl.constexpr):
    # A row is a head up to the next 16-byte border, a body of whole vectors, and a tail shorter than a vector.
    aligned = (start + VECTOR - 1) // VECTOR * VECTOR
    head = tl.minimum(aligned - start, vocabulary).to(tl.int32)
    body = (vocabulary - head) // VECTOR * VECTOR
    return aligned, head, body


@triton.jit
def _gradient(x, is_id, maximum, log2_total, scale, g, a, b):
    log2_p = (x.to(tl.float32) - maximum) * scale - log2_total
    p = tl.exp2(log2_p)
    dx = tl.where(p == 0, 0.0, p * (a + b * log2_p))
    return tl.where(is_id, dx + g, dx)


@triton.jit(do_not_specialize=["offset", "inner", "outer_stride", "inner_stride", "ignore_index"])
def _backward_kernel(
    grad_logits,  # may be the logits: each is read before it is written, by the same thread
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
    maximum = tl.load(stats + 2 * row)
    log2_total = tl.load(stats + 2 * row + 1)
    g = tl.full([], 0.0, tl.float32)
    a = g
    b = g
    if grad_logprobs is not None:
        g = tl.load(grad_logprobs + row) * scale * LN2
        a = -g
    if grad_entropy is not None:
        h = tl.load(grad_entropy + row) * scale * LN2
        a -= h * tl.load(entropy + row)
        b = -h * LN2
    # A row without a gradient is not read: whatever it holds, NaN too, its gradient is 0.
    used = (id != ignore_index) & ((g != 0) | (b != 0))

    start = _row_start(row, offset, inner, outer_stride, inner_stride)
    aligned, head, body = _split(start, vocabulary, VECTOR)
    grad_start = start if SAME_LAYOUT else row * vocabulary
    grad_body = aligned if SAME_LAYOUT else grad_start + head
    id_in_body = id - head
    places = tl.arange(0, THREADS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    for first in range(0, body, THREADS * VECTOR):
        place = first + places
        x = tl.load(logits + aligned + place, mask=place < tl.where(used, body, 0), other=0.0)
        dx = _gradient(x, place == id_in_body, maximum, log2_total, scale, g, a, b)
        tl.store(grad_logits + grad_body + place, tl.where(used, dx, 0.0), mask=place < body)
    if body < vocabulary:
        column = tl.where(places < head, places, places + body)
        x = tl.load(logits + start + column, mask=column < tl.where(used, vocabulary, 0), other=0.0)
        dx = _gradient(x, column == id, maximum, log2_total, scale, g, a, b)
        tl.store(grad_logits + grad_start + column, tl.where(used, dx, 0.0), mask=column < vocabulary)


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
                **_launch_options(logits),
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
            **_launch_options(logits),
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


def _launch_options(logits: Tensor) -> dict[str, int]:
    """THREADS that each hold one 16-byte VECTOR at a time, at most four to a thread of the GPU."""
    vector = 16 // logits.element_size()
    threads = min(1024, max(32, triton.next_power_of_2(triton.cdiv(logits.shape[-1], vector))))
    return {"THREADS": threads, "VECTOR": vector, "num_warps": min(8, threads // 32), "enable_fp_fusion": True}
