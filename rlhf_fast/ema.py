"""An exponential moving average of the weights that an optimiser trains (Polyak and Juditsky 1992).

It averages the optimiser's own copy of the weights: fp32 under half precision, the trained ones alone (with LoRA the
adapters), and of those this rank's part where ZeRO splits them. So it is split as the optimiser is, and needs nothing
from other ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlhf_fast.errors import CheckpointError


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights, once a call of update(); it begins as the weights.

    weights: tensors that the optimiser changes in place, of any shape; the average lies where they lie.
    """

    @torch.no_grad()
    def __init__(self, weights: Sequence[Tensor], decay: float) -> None:
        self.decay = decay
        self._weights = [weight.detach() for weight in weights]
        self._average = [weight.clone() for weight in self._weights]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights in as they are now."""
        torch._foreach_lerp_(self._average, self._weights, 1 - self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and average, in place. A second time puts both back, bit for bit."""
        for weight, average in zip(self._weights, self._average, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def save(self, file: Path) -> None:
        """Write the average, for load()."""
        torch.save(self._average, file)

    @torch.no_grad()
    def load(self, file: Path) -> None:
        """Go on from a saved average. Raises CheckpointError: not there, or of other weights."""
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise CheckpointError(f"{file}: no averaged weights") from None
        if [tensor.shape for tensor in saved] != [tensor.shape for tensor in self._average]:
            raise CheckpointError(f"{file}: holds averages of other weights than this run's")
        for average, tensor in zip(self._average, saved, strict=True):
            average.copy_(tensor)
