"""Several rewards, added up with weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.errors import RewardError

from .base import Prompt, Reward, RewardScores, describe_row


class WeightedSum(Reward):
    """total = sum of weight * score. Weights are not normalised; with weight 0 a part is only reported."""

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float]) -> None:
        self.rewards, self.weights = list(rewards), [float(weight) for weight in weights]
        self.name = "+".join(reward.name for reward in rewards)
        self.label = "the weighted sum of " + ", ".join(reward.label for reward in rewards)

    @property
    def part_names(self) -> list[str]:
        return [name for reward in self.rewards for name in reward.part_names]

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for reward in self.rewards:
                stack.enter_context(reward.gathered())
            yield

    def _score(self, prompts: list[Prompt], completions: list[str], columns: dict[str, list[Any]]) -> RewardScores:
        total = torch.zeros(len(completions), dtype=torch.float64)
        parts: dict[str, Tensor] = {}
        for reward, weight in zip(self.rewards, self.weights, strict=True):
            scores = reward.score(prompts, completions, **columns)
            total += weight * scores.total.double()
            parts |= scores.parts
        total = total.float()
        infinite = (~total.isfinite()).nonzero().flatten().tolist()
        if infinite:
            row = infinite[0]
            found = ", ".join(f"{name} {part[row]:g}" for name, part in parts.items())
            raise RewardError(
                f"{self.label} is too large for float32 at {describe_row(row, prompts, completions)}: {found}. "
                "Use smaller weights."
            )
        return RewardScores(total, parts)
