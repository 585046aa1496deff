"""The softmax of a row of logits on the GPU and the gradient over it: the parts that the kernels on logits share.

A row belongs to one program. Online softmax (Milakov and Gimelshein 2018) over tiles in which each thread holds whole
16-byte vectors with a maximum and sums of its own: one rescaling for eight bf16 logits, nothing exchanged until the
end. Formulas: csrc/cpu/gather_logprobs.h. A row's result does not depend on the other rows.

The logits equal to the largest are counted apart. Beside their 1 a float would lose the others, and the log-prob of a
token that is almost certain is made of the others alone; so is its gradient, which the row's end computes once.
"""

# Triton reads the annotations of a kernel's arguments as their types, so they carry none.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

LOG2E = math.log2(math.e)
LN2 = tl.constexpr(math.log(2.0))
TO_LOG2 = tl.constexpr(LOG2E)


@triton.jit
def row_start(row, offset, inner, outer_stride, inner_stride):
    # In elements, and in 64 bits, as rows times vocabulary passes 2^31. Two levels of strides: logits[:, :-1].
    row = row.to(tl.int64)
    return offset + row // inner * outer_stride + row % inner * inner_stride


@triton.jit
def _add(x, largest, count, others, weighted, scale, ENTROPY: tl.constexpr):
    # Takes x [THREADS, VECTOR] into what is known so far [THREADS]: how many are the largest, and of the others, with
    # t = (x - largest) * scale, the sum of 2^t and that of 2^t * t. As long as all is -inf, 0 takes the place of the
    # maximum (-inf - -inf would be NaN) and the sums stay 0.
    x = x.to(tl.float32)
    maximum = tl.maximum(largest, tl.max(x, axis=1))
    finite = tl.where(maximum == -float("inf"), 0.0, maximum)
    shift = (largest - finite) * scale
    factor = tl.exp2(shift)
    t = (x - finite[:, None]) * scale
    e = tl.exp2(t)
    if ENTROPY:
        weighted = tl.where(factor == 0, 0.0, (weighted + shift * (count + others)) * factor)
        weighted += tl.sum(tl.where(e == 0, 0.0, e * t), axis=1)
    is_largest = (x == finite[:, None]).to(tl.float32)
    stays = largest == maximum
    # Exactly 0 for the largest, as 2^0 is exactly 1; subtracted, so that the NaN of plus infinity stays.
    others = tl.where(stays, others, (count + others) * factor) + tl.sum(e - is_largest, axis=1)
    count = tl.where(stays, count, 0.0) + tl.sum(is_largest, axis=1)
    return maximum, count, others, weighted


@triton.jit
def _add_all(logits, start, end, scale, ENTROPY: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    places = tl.arange(0, THREADS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    largest = tl.full([THREADS], -float("inf"), tl.float32)
    count = tl.zeros([THREADS], tl.float32)
    others = tl.zeros([THREADS], tl.float32)
    weighted = tl.zeros([THREADS], tl.float32)
    for first in range(0, end, THREADS * VECTOR):
        x = tl.load(logits + start + first + places, mask=first + places < end, other=-float("inf"))
        largest, count, others, weighted = _add(x, largest, count, others, weighted, scale, ENTROPY)
    return largest, count, others, weighted


@triton.jit
def _log2_of_sum(count, others):
    # log2(count + others); near 1 by log(1 + x) = 2 * artanh(x / (2 + x)), as a sum near 1 has lost the digits of x.
    more = count - 1.0 + others
    s = more / (2.0 + more)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11)))))
    return tl.where((count >= 1.0) & (more < 0.5), 2.0 * s * series * TO_LOG2, tl.log2(count + others))


@triton.jit
def _one_less_exp(x):
    # 1 - exp(x) for x <= 0, near 0 by its series
    series = tl.full([], 1.0, tl.float32)
    for i in tl.static_range(8):
        series = 1.0 + x * (1.0 / (9 - i)) * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def read_row(logits, start, vocabulary, id, scale, ENTROPY: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """(largest logit, log2 of the sum of 2^t, logit of id: NaN if there is no such id, entropy: 0 unless ENTROPY)"""
    body = vocabulary // VECTOR * VECTOR
    # Which thread adds which logits depends on the vocabulary alone, not on where the row happens to lie: a row has the
    # same bits in any batch. Multiplying by VECTOR tells the compiler that these rows can be loaded by whole vectors.
    if start % VECTOR == 0:
        whole = start // VECTOR * VECTOR
        largest, count, others, weighted = _add_all(logits, whole, body, scale, ENTROPY, THREADS, VECTOR)
    else:
        largest, count, others, weighted = _add_all(logits, start, body, scale, ENTROPY, THREADS, VECTOR)
    if body < vocabulary:
        column = body + tl.arange(0, THREADS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        x = tl.load(logits + start + column, mask=column < vocabulary, other=-float("inf"))
        largest, count, others, weighted = _add(x, largest, count, others, weighted, scale, ENTROPY)

    maximum = tl.max(largest, axis=0)
    shift = (largest - tl.where(maximum == -float("inf"), 0.0, maximum)) * scale
    factor = tl.exp2(shift)
    row_count = tl.sum(tl.where(largest == maximum, count, 0.0), axis=0)
    row_others = tl.sum(tl.where(largest == maximum, others, (count + others) * factor), axis=0)
    log2_total = _log2_of_sum(row_count, row_others)
    valid = (id >= 0) & (id < vocabulary)
    chosen = tl.load(logits + start + id, mask=valid, other=float("nan")).to(tl.float32)
    entropy = tl.full([], 0.0, tl.float32)
    if ENTROPY:
        row_weighted = tl.sum(tl.where(factor == 0, 0.0, (weighted + shift * (count + others)) * factor), axis=0)
        entropy = (log2_total - row_weighted / (row_count + row_others)) * LN2
    return maximum, log2_total, chosen, entropy


@triton.jit
def logprob_of(logit, maximum, log2_total, scale):
    return ((logit - maximum) * scale - log2_total) * LN2


@triton.jit
def _split(start, vocabulary, VECTOR: tl.constexpr):
    # A row is a head up to the next 16-byte border, a body of whole vectors, and a tail shorter than a vector.
    aligned = (start + VECTOR - 1) // VECTOR * VECTOR
    head = tl.minimum(aligned - start, vocabulary).to(tl.int32)
    body = (vocabulary - head) // VECTOR * VECTOR
    return aligned, head, body


@triton.jit
def _gradient(x, is_id, maximum, log2_total, scale, at_id, a, b):
    log2_p = (x.to(tl.float32) - maximum) * scale - log2_total
    p = tl.exp2(log2_p)
    dx = tl.where(p == 0, 0.0, p * (a + b * log2_p))
    return tl.where(is_id, at_id, dx)


@triton.jit
def write_gradient(
    grad_logits,  # may be the logits: each is read before it is written, by the same thread
    grad_start,
    logits,
    start,
    vocabulary,
    id,
    chosen,  # its logit
    maximum,
    log2_total,
    entropy,
    g,  # the gradient of g * logprob(id) + h * entropy
    h,
    used,  # False: the row is not read, and its gradient is 0
    scale,
    SAME_LAYOUT: tl.constexpr,  # grad_start is start, and as well aligned
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    g = g * scale * LN2
    h = h * scale * LN2
    a = -g - h * entropy
    b = -h * LN2
    logprob = logprob_of(chosen, maximum, log2_total, scale)
    p = tl.exp(logprob)
    at_id = g * _one_less_exp(logprob) - tl.where(p == 0, 0.0, h * p * (entropy + logprob))
    aligned, head, body = _split(start, vocabulary, VECTOR)
    grad_body = aligned if SAME_LAYOUT else grad_start + head
    id_in_body = id - head
    places = tl.arange(0, THREADS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    for first in range(0, body, THREADS * VECTOR):
        place = first + places
        x = tl.load(logits + aligned + place, mask=place < tl.where(used, body, 0), other=0.0)
        dx = _gradient(x, place == id_in_body, maximum, log2_total, scale, at_id, a, b)
        tl.store(grad_logits + grad_body + place, tl.where(used, dx, 0.0), mask=place < body)
    if body < vocabulary:
        # Head and tail are each shorter than a vector. Several threads read each of their logits; one writes it.
        edge = tl.arange(0, 2 * VECTOR)
        column = tl.where(edge < head, edge, edge + body)
        x = tl.load(logits + start + column, mask=column < tl.where(used, vocabulary, 0), other=0.0)
        dx = _gradient(x, column == id, maximum, log2_total, scale, at_id, a, b)
        tl.store(grad_logits + grad_start + column, tl.where(used, dx, 0.0), mask=column < vocabulary)


def launch_options(logits: Tensor) -> dict[str, int]:
    """THREADS that each hold one 16-byte VECTOR at a time, at most four to a thread of the GPU."""
    vector = 16 // logits.element_size()
    threads = min(1024, max(32, triton.next_power_of_2(triton.cdiv(logits.shape[-1], vector))))
    return {"THREADS": threads, "VECTOR": vector, "num_warps": min(8, threads // 32), "enable_fp_fusion": True}
