"""Matrix instructions: the emulated device gives this GPU's registers, which are kept for machines without one."""

from __future__ import annotations

import json

import torch

from tests.cuda_on_cpu import device as emulated
from tests.gpu import device as gpu
from tests.gpu.matrix_layout import GOLDEN, found_on


def test_the_emulated_device_gives_the_gpus_registers() -> None:
    found = found_on(gpu.Device())
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps({"device": torch.cuda.get_device_name(), **found}, indent=1) + "\n")
    assert found_on(emulated.Device()) == found
