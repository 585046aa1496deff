"""What the GPU can do: copied bytes and matrix products a second. Every share of a floor is to be read beside these."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.gpu.timing import CLOCK, time_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.benchmark(timer=CLOCK)]


def test_copy(benchmark: Any) -> None:
    benchmark.group, benchmark.param = "machine: a copy of 1 GiB", "floor: read and write"
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    benchmark.extra_info["bytes"] = 2 * source.nbytes
    time_gpu(benchmark, lambda: target.copy_(source))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matrix_product(benchmark: Any, dtype: torch.dtype) -> None:
    benchmark.group = f"machine: a product of 8192x8192x8192 {str(dtype).removeprefix('torch.')}"
    benchmark.param = "floor: torch.mm, 1.1e12 multiplications and additions"
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    time_gpu(benchmark, lambda: torch.mm(a, b, out=out))
