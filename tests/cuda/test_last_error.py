"""last_error: what a launch that CUDA refuses leaves behind."""

from __future__ import annotations

import ctypes

import torch

from tests.cuda.structures import TYPES, Norm
from tests.cuda_on_cpu.device import Device


def test_a_refused_launch_is_told_once(device: Device) -> None:
    kernels = device.load("last_error.cu", "norm.cu")
    assert kernels.last_error() == 0
    residual = torch.zeros(1, 1 << 20)  # more than shared memory holds; nothing is read before that is noticed
    function = kernels.library[kernels._names["add_norm"]]
    none, size = ctypes.byref(Norm()), ctypes.c_int64(1 << 20)
    memory = ctypes.c_void_p(residual.data_ptr())
    one = ctypes.c_float(1)
    function(TYPES[torch.float32], none, None, one, memory, none, None, ctypes.c_int64(1), size, None)
    last_error = kernels.library[kernels._names["last_error"]]
    last_error.restype = ctypes.c_char_p
    assert last_error()
    emulated = type(device) is Device  # a GPU has nothing more to say
    assert ("refused" in device.take_report()) == emulated
    assert last_error() is None
