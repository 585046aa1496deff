"""Where rows of logits lie in memory. Knows nothing of Triton: the C++ ops' Python asks here too."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowLayout(NamedTuple):
    """Row r starts at element offset + r // inner * outer_stride + r % inner * inner_stride, counted from aligned."""

    offset: int  # within 16 bytes
    inner: int
    outer_stride: int
    inner_stride: int


def row_layout(logits: Tensor) -> RowLayout | None:
    """None when rows are not contiguous in themselves or lie in more than two levels of strides."""
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        return None
    levels: list[list[int]] = []  # [size, stride], from the inside out
    for size, stride in zip(reversed(logits.shape[:-1]), reversed(logits.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1][0] *= size
        else:
            levels.append([size, stride])
    if len(levels) > 2:
        return None
    (inner, inner_stride), (_, outer_stride) = (*levels, [1, 0], [1, 0])[:2]
    return RowLayout(int(logits.storage_offset()) % (16 // logits.element_size()), inner, outer_stride, inner_stride)


def aligned(logits: Tensor, layout: RowLayout) -> Tensor:
    """The 16-byte border at or before the first logit: the kernel is compiled for a pointer to one."""
    return logits.as_strided((), (), logits.storage_offset() - layout.offset)


def rows_are_disjoint(logits: Tensor) -> bool:
    """Whether each row can be overwritten: rows of an expanded tensor share their memory."""
    layout = row_layout(logits)
    if layout is None or logits.numel() == 0:
        return False
    vocabulary = logits.shape[-1]
    outer = logits.numel() // vocabulary // layout.inner
    a = layout.inner_stride if layout.inner > 1 else vocabulary
    b = layout.outer_stride if outer > 1 else layout.inner * a
    return (a >= vocabulary and b >= (layout.inner - 1) * a + vocabulary) or (
        b >= vocabulary and a >= (outer - 1) * b + vocabulary
    )
