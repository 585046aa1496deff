"""What device.h's matrix instructions make of given registers: on a GPU written to golden/, on the emulated one held
against that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.cuda_on_cpu.build import KERNELS
from tests.cuda_on_cpu.device import Device

SOURCE = Path(__file__).with_name("matrix_layout.cu")
GOLDEN = Path(__file__).with_name("golden") / "matrix_layout.json"


def found_on(device: Device) -> dict[str, list[Any]]:
    """Registers as whole numbers. Products of small whole numbers are exact in any order of summing."""
    kernels = device.load(SOURCE, include=(KERNELS,))
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[Any]] = {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        a, b = (torch.randint(-8, 9, (32, 2 * words), generator=generator).to(dtype) for words in (4, 2))
        d = device.tensor(torch.randint(-8, 9, (32, 4), generator=generator).float())
        getattr(kernels, f"multiply_{name}")(device.tensor(a), device.tensor(b), d)
        found[f"multiply_{name}"] = d.int().tolist()
    words = torch.arange(256, dtype=torch.int16).view(32, 8)
    for name in ("load_rows", "load_columns"):
        registers = device.empty(32, 8, dtype=torch.int16)
        getattr(kernels, name)(device.tensor(words), registers)
        found[name] = registers.tolist()
    return found


def golden() -> dict[str, Any] | None:
    """What a GPU gave, with its name; None as long as none has."""
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else None
