"""A GPU that is not there: kernels, memory for them, and what went wrong in them."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import build


class KernelError(Exception):
    """A report of the machine: what went wrong, in which kernel, block and thread, and where in its source."""


class Device:
    """One build of the machine under one order. Not for use by two threads at a time.

    order: 0 runs threads and blocks by rising number, 1 by falling, any other is the seed of a random order. With an
    even one asynchronous copies land when they are waited for, with an odd one at once.
    """

    def __init__(self, name: str = "plain", order: int = 0) -> None:
        self.build = build.BUILDS[name]
        self.order = order
        self._machine = _machine(name)
        self._buffers: list[int] = []
        self._machine.cuda_on_cpu_take_report()
        self._machine.cuda_on_cpu_set_order(order)
        self.limit(60)
        self.drop()

    def load(self, *sources: str | Path, include: Sequence[Path] = (build.KERNELS,)) -> Kernels:
        """The library of these .cu files: names in csrc/cuda, or paths. Compiled at first use."""
        paths = tuple(build.KERNELS / source for source in sources)  # a path that is absolute stays as it is
        return Kernels(self, *_loaded(self.build.name, paths, tuple(include)))

    def tensor(self, values: Tensor, offset: int = 0) -> Tensor:
        """A copy of it in guarded memory, contiguous; see `empty`."""
        copy = self._allocate(values.shape, values.dtype, offset, unwritten=False)
        return copy.copy_(values)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
        """Guarded memory that nobody has written: all bits set, which is NaN. The checker reports reads before writes.

        It begins `offset` bytes behind a multiple of 16, so that kernels meet addresses without the usual alignment.
        Behind its end, within 15 bytes, lies a page that cannot be touched. It lives until `close`.
        """
        return self._allocate(shape, dtype, offset, unwritten=True)

    def take_report(self) -> str:
        """What has gone wrong since the last call, or "". Until it is taken no kernel runs."""
        report: bytes = self._machine.cuda_on_cpu_take_report()
        return report.decode(errors="replace")

    def check(self) -> None:
        """Raises KernelError with the report, if there is one."""
        report = self.take_report()
        if report:
            raise KernelError(report)

    def drop(self, file: str = "", line: int = 0) -> None:
        """The barrier, wait or fence in that line does nothing from now on. Without arguments all work again.

        `file` is the end of a path.
        """
        self._machine.cuda_on_cpu_drop(file.encode(), line)

    def record_sites(self, on: bool) -> list[tuple[str, int]]:
        """Starts or ends noting the file and line of barriers that kernels meet. Returns those noted so far."""
        sites: bytes = self._machine.cuda_on_cpu_record_sites(int(on))
        pairs = [line.rpartition(":") for line in sites.decode().splitlines()]
        return [(file, int(number)) for file, _, number in pairs]

    def limit(self, seconds: float) -> None:
        """Processor time after which a launch counts as a loop without end; 60 s at first."""
        self._machine.cuda_on_cpu_set_most_milliseconds(round(1000 * seconds))

    def close(self) -> None:
        """Frees all guarded memory: its tensors must not be used again."""
        for address in self._buffers:
            self._machine.cuda_on_cpu_release(address)
        self._buffers.clear()

    def _allocate(self, shape: Sequence[int], dtype: torch.dtype, offset: int, unwritten: bool) -> Tensor:
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        address = self._machine.cuda_on_cpu_allocate(size, offset, int(unwritten))
        self._buffers.append(address)
        if count == 0:
            return torch.empty(*shape, dtype=dtype)
        memory = (ctypes.c_char * size).from_address(address)
        return torch.frombuffer(memory, dtype=dtype).view(shape)


class Kernels:
    """The functions of a library of kernels: extern "C" ones, and those of the namespace rlhf_fast::cuda.

    Tensors become pointers, structures too (C++ takes them by reference), whole numbers 64 bits, floats C's float; a
    double is written ctypes.c_double(x). What comes back is 64 bits of a whole number. Raises KernelError.
    """

    def __init__(self, device: Device, library: ctypes.CDLL, names: dict[str, str]) -> None:
        self.device = device
        self.library = library
        self._names = names

    def __getattr__(self, name: str) -> Any:
        if name not in self._names:
            raise AttributeError(f"no function {name} in {self.library._name}")
        function = self.library[self._names[name]]
        function.restype = ctypes.c_int64

        def call(*arguments: object) -> int:
            result: int = function(*map(_argument, arguments))
            self.device.check()
            return result

        return call


def _argument(value: object) -> object:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return value


@cache
def _machine(name: str) -> ctypes.CDLL:
    machine = ctypes.CDLL(str(build.runtime(build.BUILDS[name])))
    machine.cuda_on_cpu_take_report.restype = ctypes.c_char_p
    machine.cuda_on_cpu_allocate.restype = ctypes.c_void_p
    machine.cuda_on_cpu_allocate.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    machine.cuda_on_cpu_release.argtypes = [ctypes.c_void_p]
    machine.cuda_on_cpu_release.restype = None
    machine.cuda_on_cpu_set_order.restype = None
    machine.cuda_on_cpu_set_most_milliseconds.restype = None
    machine.cuda_on_cpu_drop.argtypes = [ctypes.c_char_p, ctypes.c_int]
    machine.cuda_on_cpu_drop.restype = None
    machine.cuda_on_cpu_record_sites.restype = ctypes.c_char_p
    return machine


@cache
def _loaded(name: str, sources: tuple[Path, ...], include: tuple[Path, ...]) -> tuple[ctypes.CDLL, dict[str, str]]:
    path = build.kernels(build.BUILDS[name], sources, include)
    return ctypes.CDLL(str(path)), _functions(path)


def _functions(library: Path) -> dict[str, str]:
    """Name -> symbol. rlhf_fast::cuda::f is _ZN9rlhf_fast4cuda1fE and its parameters (Itanium C++ ABI)."""
    listed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
    names = {}
    for symbol in (line.split()[-1] for line in listed.stdout.splitlines()):
        name = symbol
        if symbol.startswith("_ZN9rlhf_fast4cuda"):
            digits, _, _ = (rest := symbol.removeprefix("_ZN9rlhf_fast4cuda")).partition(rest.lstrip("0123456789"))
            if not digits or rest[len(digits) + int(digits)] != "E":
                continue  # a template's, or something in a further namespace
            name = rest[len(digits) : len(digits) + int(digits)]
        names[name] = symbol
    return names
