"""The GPU with the face of tests/cuda_on_cpu's Device, so that tests/cuda runs on it as it is: `--gpu`.

Buffers are pinned memory of the host, which the GPU reaches at the same addresses: slow, and right for small tests that
compare on the host. tests/gpu has the real sizes, in the GPU's own memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from rlhf_fast import build, build_cuda
from tests.cuda_on_cpu import device as emulated
from tests.cuda_on_cpu.build import KERNELS

GUARD = 256  # bytes before and behind a buffer that no kernel may change
MARK = 0xA5


class Device(emulated.Device):
    """The first GPU, in orders of its own."""

    def __init__(self) -> None:
        torch.cuda.init()
        self._guarded: list[tuple[Tensor, int, int]] = []  # memory, first byte and bytes of the buffer

    def load(self, *sources: str | Path, include: Sequence[Path] = (KERNELS,)) -> emulated.Kernels:
        """All of csrc/cuda in one library, or the .cu files at the paths given."""
        paths = tuple(sorted(KERNELS.glob("*.cu"))) if isinstance(sources[0], str) else tuple(map(Path, sources))
        return emulated.Kernels(self, *library(paths, tuple(include)))

    def take_report(self) -> str:
        """What CUDA has to say once all that was launched is done, or what wrote where it may not."""
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return str(error)
        for memory, first, size in self._guarded:
            if (memory[:first] != MARK).any() or (memory[first + size :] != MARK).any():
                return f"a kernel wrote outside of a buffer of {size} bytes"
        return ""

    def drop(self, file: str = "", line: int = 0) -> None:
        raise NotImplementedError("a GPU's barriers stay")

    def close(self) -> None:
        self.check()
        self._guarded.clear()

    def _allocate(self, shape: Sequence[int], dtype: torch.dtype, offset: int, unwritten: bool) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        first = GUARD + offset
        memory = torch.full((first + size + GUARD,), MARK, dtype=torch.uint8).pin_memory()
        self._guarded.append((memory, first, size))
        buffer = memory[first : first + size]
        if unwritten:
            buffer.fill_(0xFF)
        if size == 0:
            return torch.empty(*shape, dtype=dtype)
        # A view as another type would want an aligned first byte.
        return torch.frombuffer((ctypes.c_char * size).from_address(buffer.data_ptr()), dtype=dtype).view(shape)


@cache
def library(sources: tuple[Path, ...], include: tuple[Path, ...]) -> tuple[ctypes.CDLL, dict[str, str]]:
    """The kernels for this GPU, with the names of their launchers."""
    architecture = build_cuda.present()[0]
    chain = build_cuda.cuda_toolchain(architecture)
    flags = [flag.replace(",-fvisibility=hidden", "") for flag in chain.compile_flags if flag != "-fvisibility=hidden"]
    visible = build.Toolchain(chain.command, (*flags, *(f"-I{folder}" for folder in include)), chain.link_flags)
    headers = tuple(sorted(header for folder in include for header in folder.rglob("*.h")))
    path = build.build(
        build.Library("kernels", tuple(build.Unit(source) for source in sources), headers, lambda: visible)
    )
    return ctypes.CDLL(str(path)), emulated._functions(path)
