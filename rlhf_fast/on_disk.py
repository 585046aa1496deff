"""Offloaded weights, and what an optimiser keeps for each weight, in files that are mapped into memory.

The system keeps in memory what there is room for and writes the rest out, so nothing else changes: the same optimiser
makes the same step on the same tensors. DeepSpeed's own way to a disk (ZeRO-Infinity, 0.19.8) is not taken: tried, it
made steps with wrong gradients, without a word, and went on from other weights after a resume (docs/scaling.md).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")


class OptimizerOnDisk:
    """Master weights and moments in files.

    Args:
        optimizer: torch's AdamW.
        weights: the tensors that it changes, on the CPU. Their data moves into files.
        folder: on the disk; it is made if it is not there.
    Raises:
        ConfigError: the folder cannot be made, or has no room for the weights and two moments.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], folder: Path) -> None:
        self._optimizer = optimizer
        self._weights = weights
        self._files = [{name: zeros_on_disk(weight, folder) for name in ("weight", *MOMENTS)} for weight in weights]
        self.take_in()

    @torch.no_grad()
    def take_in(self) -> None:
        """Move weights and moments into the files, from wherever they are: a loaded checkpoint brings tensors of its
        own, and before the first step no moments at all."""
        for weight, files in zip(self._weights, self._files, strict=True):
            state = self._optimizer.state[weight]
            state.setdefault("step", torch.zeros(()))
            for name in MOMENTS:
                if name not in state:
                    files[name].zero_()
                elif state[name] is not files[name]:
                    files[name].copy_(state[name])
                state[name] = files[name]
            if weight.data_ptr() != files["weight"].data_ptr():
                files["weight"].copy_(weight)
                weight.data = files["weight"]


def move_weights(zero: Any, folder: Path) -> None:
    """Move what a rank keeps of the weights under ZeRO-3 with offload_param; zero: DeepSpeed's optimiser."""
    for group, weights in enumerate(zero.fp16_partitioned_groups_flat):
        zero.fp16_partitioned_groups_flat[group] = zeros_on_disk(weights, folder).copy_(weights)
        zero._unflatten_partitioned_parameters(group)
    zero.param_groups_fp16_flat_cpu_memory.clear()  # where they were


def zeros_on_disk(like: Tensor, folder: Path) -> Tensor:
    """Zeros of the same shape and dtype in a file of `folder` without a name, whose room is free again when the
    process ends, in whatever way. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, like.nbytes)  # a full disk says so now, and not in a page fault
            name = f"/proc/self/fd/{file.fileno()}"
            return torch.from_file(name, shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)
    except OSError as error:
        raise ConfigError(f"nvme_path: no {like.nbytes} bytes to be had in {folder} ({error.strerror})") from None
