"""The kernels of gae, shaped_gae and masked_whiten compiled for A100, H100 and B200, as a program:
python -m tests.ops.scan_aot gae
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from tests.ops.aot import compile_kernel
from tests.ops.aot import facts_of as facts_of_module

ARCHITECTURES = (80, 90, 100)
KERNELS = {
    "gae": ("_kernel",),
    "shaped_gae": ("_kernel",),
    "masked_whiten": ("_partial_moments_kernel", "_merge_kernel", "_normalise_kernel"),
}
DOUBLE = ("partials", "moments")
INTEGERS = ("columns", "size", "part_size", "parts")
NUMBERS = ("gamma", "decay", "kl_coef", "clip_score", "eps")
CONSTANTS = {"ALIGNED": True, "VECTOR": 4, "PARTS": 512, "SHIFT_MEAN": True, "ESTIMATOR": 3}


def facts_of(op: str) -> dict[str, dict[str, Any]]:
    """What the compiler made of each kernel of the op on each architecture."""
    return facts_of_module("tests.ops.scan_aot", op)


def compile_one(op: str, kernel: str, arch: int) -> dict[str, Any]:
    """As the launcher would for float32 and 1,024 columns or more, on any aligned strides."""
    function = getattr(importlib.import_module(f"rlhf_fast.kernels.{op}"), kernel)
    constants = CONSTANTS | {"BLOCK": 2048 if op == "masked_whiten" else 1024}

    def kind(name: str) -> str:
        if name in INTEGERS or name.endswith("_stride"):
            return "i32"
        if name in NUMBERS:
            return "fp32"
        return "*u8" if name == "mask" else "*fp64" if name in DOUBLE else "*fp32"

    types = {name: kind(name) for name in function.arg_names if name not in constants}
    warps = 4 if kernel == "_merge_kernel" else 8
    return compile_kernel(function, arch, types, constants, {"num_warps": warps, "enable_fp_fusion": True})


if __name__ == "__main__":
    op = sys.argv[1]
    print(json.dumps({f"{k} {a}": compile_one(op, k, a) for k in KERNELS[op] for a in ARCHITECTURES}))
