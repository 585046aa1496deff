"""The twins of tensor-core instructions: a matrix product whose registers lie as PTX's manual says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .device import Device

SOURCE = Path(__file__).parent / "matrix_layout.cu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", ["plain", "checker", "asan"])
def test_a_product(build: str, dtype: torch.dtype) -> None:
    device = Device(build)
    generator = torch.Generator().manual_seed(1)
    # Whole numbers: their sums have one value in whatever order.
    a = device.tensor(torch.randint(-50, 50, (16, 16), generator=generator).to(dtype))
    b = device.tensor(torch.randint(-50, 50, (16, 8), generator=generator).to(dtype))
    d = device.empty(16, 8)
    device.load(SOURCE).multiply(int(dtype == torch.float16), a, b, d, None)
    assert torch.equal(d, a.float() @ b.float() + 1)
    device.close()
