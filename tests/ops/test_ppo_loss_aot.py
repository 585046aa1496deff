"""The Triton kernels of ppo_loss and value_loss compiled for A100, H100 and B200 without one."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest

from tests.ops.aot import assert_fits, compile_kernel, facts_of

ARCHS = [80, 90, 100]
KERNELS = ["ppo_loss", "value_loss"]
NUMBERS = ("clip_low", "clip_high", "dual_clip", "kl_coef", "entropy_coef", "cliprange_value")


def compile_one(kernel: str, arch: int) -> dict[str, Any]:
    """With every option that makes the kernel larger, as the launch is specialised for a multiple of 16 tokens."""
    from rlhf_fast.kernels._token_sums import BLOCK, LAUNCH

    function = importlib.import_module(f"rlhf_fast.kernels.{kernel}")._kernel
    constants = {"DUAL_CLIP": True, "KL": 3, "BLOCK": BLOCK}
    types = dict.fromkeys((name for name in function.arg_names if name not in constants), "*fp32")
    types |= {name: "fp32" for name in NUMBERS if name in types} | {"mask": "*i1", "tokens": "i32"}
    return compile_kernel(function, arch, types, constants, LAUNCH, multiples_of_16=["tokens"])


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    return facts_of("tests.ops.test_ppo_loss_aot")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_fits_the_machine(compiled: dict[str, dict[str, Any]], kernel: str, arch: int) -> None:
    """No spills, little shared memory, memory read and written by 16 bytes."""
    facts = compiled[f"{kernel} {arch}"]
    assert_fits(facts, registers=255, shared=1024)
    assert facts["wide_loads"] >= (6 if kernel == "ppo_loss" else 3)  # one a tensor, at least
    assert facts["wide_stores"] >= (2 if kernel == "ppo_loss" else 1)


if __name__ == "__main__":
    print(json.dumps({f"{k} {a}": compile_one(k, a) for k in KERNELS for a in ARCHS}))
