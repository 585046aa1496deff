"""docs/generation.md: its example runs, its table has the filters in the order in which they act."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from rlhf_fast.generation import SamplingParams
from tests.conftest import save_tiny_llama

PAGE = (Path(__file__).parents[2] / "docs" / "generation.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_llama(tmp_path / "runs/demo/sft/final")
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(example, "generation.md", "exec"), {"__name__": "page"})
    assert re.match(r"(stop|length) \d+ -", capsys.readouterr().out)


def test_the_table_of_sampling_params() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", PAGE, re.MULTILINE)
    defaults = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    assert [name for name, _ in rows] == ["min_tokens", "repetition_penalty", "temperature", "min_p", "top_k", "top_p"]
    assert {name: float(default) for name, default in rows}.items() <= defaults.items()
    for name in defaults:
        assert f"`{name}" in PAGE, name
