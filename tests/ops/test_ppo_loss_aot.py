"""The Triton kernels of ppo_loss and value_loss compiled for A100, H100 and B200 without one.

Compiling needs Triton's compiler, not the interpreter that the other tests run with, hence a process of its own: this
module as a program, which prints what it found.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ops.test_gather_logprobs_aot import resources

ROOT = Path(__file__).parents[2]
ARCHS = [80, 90, 100]
KERNELS = ["ppo_loss", "value_loss"]
NUMBERS = ("clip_low", "clip_high", "dual_clip", "kl_coef", "entropy_coef", "cliprange_value")


def compile_kernel(kernel: str, arch: int) -> dict[str, Any]:
    """With every option that makes the kernel larger."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rlhf_fast.kernels._token_sums import BLOCK, LAUNCH

    function = importlib.import_module(f"rlhf_fast.kernels.{kernel}")._kernel
    names = function.arg_names
    constants = {"DUAL_CLIP": True, "KL": 3, "BLOCK": BLOCK}
    types = {**dict.fromkeys(NUMBERS, "fp32"), "mask": "*i1", "tokens": "i32", **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, "*fp32") for name in names}
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={name: constants[name] for name in names if name in constants},
        # As Triton specialises the launch when the tokens are a multiple of 16.
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if signature[name].startswith("*") or name == "tokens"
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=LAUNCH)
    ptx = compiled.asm["ptx"]
    return {
        "resources": resources(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
    }


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.test_ppo_loss_aot"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_fits_the_machine(compiled: dict[str, dict[str, Any]], kernel: str, arch: int) -> None:
    """No spills, little shared memory, memory read and written by 16 bytes."""
    facts = compiled[f"{kernel} {arch}"]
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", facts["resources"])}
    assert usage["STACK"] == usage["LOCAL"] == 0
    assert usage["REG"] <= 255
    assert facts["shared"] <= 1024
    assert facts["wide_loads"] >= (6 if kernel == "ppo_loss" else 3)  # one a tensor, at least
    assert facts["wide_stores"] >= (2 if kernel == "ppo_loss" else 1)


if __name__ == "__main__":
    print(json.dumps({f"{k} {a}": compile_kernel(k, a) for k in KERNELS for a in ARCHS}))
