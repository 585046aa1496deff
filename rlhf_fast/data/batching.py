"""Micro-batches by a budget of tokens, and padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def token_budget_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of rows, grouped into micro-batches of rows * longest <= budget tokens (padding counts).

    Rows go together by length, longest first: the largest batch comes first, so memory that is short is short at once.
    A row longer than the budget is alone. Of all groupings of the sorted rows this one has the fewest batches.
    """
    if budget < 1:
        raise ValueError(f"budget must be at least 1 token, not {budget}")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        rows = max(1, budget // max(1, lengths[order[start]]))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def pad_right(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str | None = None) -> torch.Tensor:
    """int64 [B, L]: the rows, filled up with pad_id to the longest one's length L."""
    length = max((len(row) for row in rows), default=0)
    padded = [[*row, *([pad_id] * (length - len(row)))] for row in rows]
    return torch.tensor(padded, dtype=torch.long, device=device).reshape(len(rows), length)
