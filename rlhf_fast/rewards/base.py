"""What all rewards have in common: one finite float32 a completion, or a RewardError that says which one is not."""

from __future__ import annotations

import contextlib
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.errors import RewardError

Prompt = str | list[dict[str, Any]]
FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class RewardScores:
    """Scores of one batch, on the CPU: `total` [B] float32, and the same of every part by its name, before weights."""

    total: Tensor
    parts: dict[str, Tensor]


class Reward(ABC):
    """Scores completions. `name` is for metrics (rewards/<name>), `label` for messages."""

    name: str
    label: str

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str], /, **columns: Sequence[Any]) -> RewardScores:
        """One finite number for each of B completions.

        prompts: B strings or message lists. completions: B strings. columns: lists of B values each, the data's other
        columns by name. An empty batch is scored without asking anybody.

        Raises RewardError, naming the reward, the row and what came back, for everything that goes wrong on the
        reward's side. Then nothing is returned at all.
        """
        rows = len(prompts)
        if len(completions) != rows:
            raise ValueError(f"{rows} prompts and {len(completions)} completions: one completion a prompt was expected")
        for name, values in columns.items():
            if name in ("prompts", "completions"):
                raise RewardError(
                    f"{self.label}: the data has a column called {name!r}, which is what rewards get from the rollout. "
                    "Rename the column."
                )
            if len(values) != rows:
                raise ValueError(f"column {name!r} has {len(values)} values for {rows} completions")
        if not rows:
            return RewardScores(torch.zeros(0), {name: torch.zeros(0) for name in self.part_names})
        return self._score(list(prompts), list(completions), {name: list(column) for name, column in columns.items()})

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        """To be entered around score() on every rank alike, also by one without rows: a model that is split over the
        ranks is whole inside."""
        return contextlib.nullcontext()

    @property
    def part_names(self) -> list[str]:
        """The keys of RewardScores.parts."""
        return [self.name]

    @abstractmethod
    def _score(self, prompts: list[Prompt], completions: list[str], columns: dict[str, list[Any]]) -> RewardScores:
        """Score at least one row. The lists are the callee's own."""


def checked_scores(
    label: str, returned: Any, prompts: Sequence[Prompt], completions: Sequence[str], *, first_row: int = 0
) -> Tensor:
    """[B] float32 from what a reward returned: a list, tuple, tensor or array of B finite numbers.

    Numbers are Python's, numpy's and torch's scalars; True counts as 1. first_row is the batch's index of prompts[0].
    Raises RewardError that names the row and what was there instead.
    """

    def fail(problem: str, row: int | None = None) -> RewardError:
        where = "" if row is None else f" at {describe_row(row, prompts, completions, first_row)}"
        return RewardError(f"{label} {problem}{where}. {len(completions)} finite numbers were expected.")

    if returned is None:
        raise fail("returned None (is a `return` missing?)")
    shape = getattr(returned, "shape", None)
    if shape is not None and len(shape) != 1:
        raise fail(f"returned a {_type(returned)} of shape {list(shape)}, not [{len(completions)}]")
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, list | tuple):
        raise fail(f"returned {_shown(returned)}, not a list")
    if len(values) < len(completions):
        raise fail(f"returned {len(values)} scores for {len(completions)} completions: none", row=len(values))
    if len(values) > len(completions):
        raise fail(f"returned {len(values)} scores for {len(completions)} completions")

    scores = []
    for row, value in enumerate(values):
        number = _number(value)
        if number is None:
            hint = ""
            if value is None:
                hint = " (TRL reads None as 'does not apply'; here every completion needs a number, 0.0 for instance)"
            raise fail(f"returned {_shown(value)}{hint}", row)
        if not math.isfinite(number):
            raise fail(f"returned {number}", row)
        if abs(number) > FLOAT32_MAX:
            raise fail(f"returned {number:g}, too large for float32,", row)
        scores.append(number)
    return torch.tensor(scores, dtype=torch.float32)


def describe_row(row: int, prompts: Sequence[Prompt], completions: Sequence[str], first_row: int = 0) -> str:
    """'row 3 (prompt 'Who ...', completion 'I ...')'; `row` counts from prompts[0]."""
    prompt, completion = prompts[row], completions[row]
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content", "")) if prompt else ""
    return f"row {first_row + row} (prompt {_start(text)}, completion {_start(completion)})"


def _number(value: Any) -> float | None:
    """The value as a float, which may be infinite or NaN; None where it is no number."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # numpy's and torch's scalars
        value = value.item()
    if not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:  # an int beyond float64
        return math.inf


def _start(text: str, limit: int = 60) -> str:
    return repr(text) if len(text) <= limit else repr(text[:limit]) + "..."


def _shown(value: Any) -> str:
    if value is None:
        return "None"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:60] + '...'} (a {_type(value)})"


def _type(value: Any) -> str:
    return type(value).__name__
