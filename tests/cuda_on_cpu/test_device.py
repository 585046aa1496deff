"""Memory and calls: what Python gives to kernels and what comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .device import Device, KernelError

SOURCE = """
#include "device.h"
namespace rlhf_fast::cuda {
template <typename T>
__global__ void add(const T* x, T* y, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) y[i] = from_float<T>(to_float(x[i]) + 1);
}
int64_t add_one(int type, const void* x, void* y, int64_t count) {
  const dim3 grid((count + 31) / 32);
  if (type == 0) launch<add<float>>(grid, 32, 0, nullptr, static_cast<const float*>(x), static_cast<float*>(y), count);
  if (type == 1) {
    launch<add<__nv_bfloat16>>(grid, 32, 0, nullptr, static_cast<const __nv_bfloat16*>(x),
                               static_cast<__nv_bfloat16*>(y), count);
  }
  if (type == 2) {
    launch<add<__half>>(grid, 32, 0, nullptr, static_cast<const __half*>(x), static_cast<__half*>(y), count);
  }
  return count + (int64_t(1) << 40);
}
}
"""
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["plain", "asan"])
def device(request: pytest.FixtureRequest):
    device = Device(request.param)
    yield device
    device.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "add.cu"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("offset", [0, 4])
def test_a_kernel_runs(device: Device, source: Path, dtype: torch.dtype, offset: int) -> None:
    values = torch.randn(3, 35, dtype=dtype)
    x = device.tensor(values, offset)
    y = device.empty(3, 35, dtype=dtype, offset=offset)
    assert y.isnan().all()
    assert x.data_ptr() % 16 == offset
    assert device.load(source).add_one(TYPES.index(dtype), x, y, x.numel()) == x.numel() + 2**40
    assert torch.equal(y, (values.float() + 1).to(dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_beyond_a_buffer(device: Device, source: Path, dtype: torch.dtype) -> None:
    kernels = device.load(source)
    x, y = (device.tensor(torch.zeros(35, dtype=dtype)) for _ in range(2))
    with pytest.raises(KernelError, match=r"add.*out of bounds"):
        kernels.add_one(TYPES.index(dtype), x, y, 45)  # beyond the last 16 bytes too
    kernels.add_one(TYPES.index(dtype), x, y, 35)
    assert torch.equal(y, torch.ones(35, dtype=dtype))


def test_conversions_are_pytorch_s(device: Device, source: Path) -> None:
    """All 65536 halves through float and back, with every rounding of x + 1 on the way."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = device.tensor(bits.view(dtype))
        y = device.empty(65536, dtype=dtype)
        device.load(source).add_one(TYPES.index(dtype), x, y, 65536)
        assert torch.equal(y.nan_to_num(nan=-3.0), (x.float() + 1).to(dtype).nan_to_num(nan=-3.0))


def test_a_grid_that_cuda_refuses(device: Device, source: Path) -> None:
    with pytest.raises(KernelError, match=r"refused: a grid of 0 x 1 x 1"):
        device.load(source).add_one(0, None, None, 0)


def test_the_compiler_s_words(device: Device, tmp_path: Path) -> None:
    path = tmp_path / "wrong.cu"
    path.write_text("int f() { return missing; }")
    with pytest.raises(Exception, match="missing"):
        device.load(path)
