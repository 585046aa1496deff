"""masked_whiten's Triton kernels compiled for A100, H100 and B200 without one: what the compiler made of them."""

from __future__ import annotations

from tests.ops.aot import assert_fits
from tests.ops.scan_aot import ARCHITECTURES, KERNELS, facts_of


def test_kernels() -> None:
    """No spills, little shared memory."""
    facts = facts_of("masked_whiten")
    for kernel in KERNELS["masked_whiten"]:
        for arch in ARCHITECTURES:
            found = facts[f"{kernel} {arch}"]
            assert_fits(found, registers=128, shared=16 * 1024)
