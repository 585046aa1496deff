"""The GPU decoder on the CPU: its host code and all kernels in one library, for the emulated device."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from tests.cuda_on_cpu import build
from tests.cuda_on_cpu.device import Device

HOST = build.KERNELS.parent / "generation" / "cuda"


@cache
def library() -> ctypes.CDLL:
    """CUDA graphs are the one part that it lacks."""
    host = [path for path in sorted(HOST.glob("*.cpp")) if path.stem != "memory"]
    ours = [Path(__file__).with_name(f"{name}_on_cpu.cpp") for name in ("memory", "driver")]
    sources = [*sorted(build.KERNELS.glob("*.cu")), *host, *ours]
    folders = (build.KERNELS, build.KERNELS.parent / "cpu", build.KERNELS.parent / "generation")
    Device()  # the machine, and nothing that an earlier kernel left
    return ctypes.CDLL(str(build.kernels(build.PLAIN, sources, folders, flags=("-std=c++20",))))


def address() -> int:
    """Of rlhf_fast_cuda_backend, for the C++ decoder."""
    found = ctypes.cast(library().rlhf_fast_cuda_backend, ctypes.c_void_p).value
    assert found is not None
    return found
