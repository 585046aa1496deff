"""Compiles the kernels of gae, shaped_gae and masked_whiten without a GPU and prints what the compiler made of them.

A program, as compiling needs Triton's compiler and the tests run with its interpreter:
python -m tests.ops.scan_aot gae
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    """compile_kernel of each kernel of the op on each architecture, in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.scan_aot", op]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def compile_kernel(op: str, kernel: str, arch: int) -> dict[str, Any]:
    """Compile as the launcher would for float32 and 1,024 columns or more, on any aligned strides."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tests.ops.test_gather_logprobs_aot import resources

    module = importlib.import_module(f"rlhf_fast.kernels.{op}")
    function = getattr(module, kernel)
    block = 2048 if op == "masked_whiten" else 1024
    constants = CONSTANTS | {"BLOCK": block}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in INTEGERS or name.endswith("_stride"):
            return "i32"
        if name in NUMBERS:
            return "fp32"
        return "*u8" if name == "mask" else "*fp64" if name in DOUBLE else "*fp32"

    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={name: kind(name) for name in names},
        constexprs={name: constants[name] for name in names if name in constants},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if kind(name).startswith("*")},
    )
    warps = 4 if kernel == "_merge_kernel" else 8
    options = {"num_warps": warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", resources(compiled.asm["cubin"]))
    return {
        **{key: int(value) for key, value in usage},
        "shared": compiled.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"])),
        "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32", compiled.asm["ptx"])),
        "ttir": compiled.asm["ttir"],
    }


if __name__ == "__main__":
    op = sys.argv[1]
    print(json.dumps({f"{k} {a}": compile_kernel(op, k, a) for k in KERNELS[op] for a in ARCHITECTURES}))
