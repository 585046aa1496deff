"""The most memory that this process has used."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory_gb(device: torch.device | str = "cpu") -> float:
    """Peak in GB (1e9 bytes) since the process began: of tensors on a CUDA device, else of the process's own RAM."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9  # macOS counts bytes, Linux KiB
