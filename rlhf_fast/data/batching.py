"""Micro-batches by a budget of tokens, and padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def token_budget_batches(lengths: Sequence[int], budget: int, *, at_least: int = 1) -> list[list[int]]:
    """Indices of rows, grouped into micro-batches of rows * longest <= budget tokens (padding counts).

    Rows go together by length, longest first: the largest batch comes first, so memory that is short is short at once.
    A row longer than the budget is alone. Of all groupings of the sorted rows this one has the fewest batches.
    at_least: make so many batches, or one a row if there are fewer rows, by halving the largest ones. Ranks that must
    run equally often pass the largest count of all ranks.
    """
    if budget < 1:
        raise ValueError(f"budget must be at least 1 token, not {budget}")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    while order:
        rows = max(1, budget // max(1, lengths[order[0]]))
        batches.append(order[:rows])
        order = order[rows:]
    while len(batches) < min(at_least, len(lengths)):
        sizes = [len(b) * lengths[b[0]] if len(b) > 1 else -1 for b in batches]
        largest = sizes.index(max(sizes))
        half = (len(batches[largest]) + 1) // 2
        batches[largest : largest + 1] = [batches[largest][:half], batches[largest][half:]]
    return batches


def pad_right(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str | None = None) -> torch.Tensor:
    """int64 [B, L]: the rows, filled up with pad_id to the longest one's length L."""
    length = max((len(row) for row in rows), default=0)
    padded = [[*row, *([pad_id] * (length - len(row)))] for row in rows]
    return torch.tensor(padded, dtype=torch.long, device=device).reshape(len(rows), length)
