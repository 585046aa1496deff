"""gae's Triton kernel compiled for A100, H100 and B200 without one: what the compiler made of it."""

from __future__ import annotations

import re

from tests.ops.aot import assert_fits
from tests.ops.scan_aot import ARCHITECTURES, facts_of


def test_kernel() -> None:
    """No spills, little shared memory, 16 bytes at a time from and to every tensor, row offsets in 64 bits."""
    facts = facts_of("gae")
    for arch in ARCHITECTURES:
        found = facts[f"_kernel {arch}"]
        assert_fits(found, registers=128, shared=16 * 1024)
        assert found["wide_loads"] >= 2
        assert found["wide_stores"] >= 2
        assert re.search(r"arith\.extsi %values_stride\b.* : i32 to i64", found["ttir"])
        assert not re.search(r"arith\.muli .*_stride\b.* : i32", found["ttir"])
