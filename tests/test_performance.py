"""docs/performance.md: its tables are those of the model that it describes, and the model counts what a step reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.generation.decode_on_paper import H100, LLAMA_1B, LLAMA_7B, Decoder, kernels, tables

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def test_the_page_has_the_model_s_tables() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for table in tables():
        assert table in text


@pytest.mark.parametrize(("model", "parameters"), [(LLAMA_1B, 1.2358e9), (LLAMA_7B, 6.7384e9 - 32000 * 4096)])
def test_a_step_reads_every_weight(model: Decoder, parameters: float) -> None:
    """`parameters`: of the published model, without an embedding that is no head."""
    step = list(kernels(model, 1, 0))
    assert sum(kernel.bytes for kernel in step) == pytest.approx(2 * parameters, rel=2e-3)
    assert all(kernel.expected(H100) > kernel.floor(H100) for kernel in step)
