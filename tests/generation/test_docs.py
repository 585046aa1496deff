"""docs/generation.md: its example runs, and its tables say what the code and the tests do."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlhf_fast.generation import SamplingParams
from rlhf_fast.generation.model_spec import _FAMILIES
from tests.conftest import save_tiny_llama
from tests.families import tiny_config
from tests.generation.test_cpp_backend import SHAPES
from tests.generation.test_lora import ADAPTED

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


def test_the_table_of_families_is_what_the_decoder_is_tried_with() -> None:
    tried: dict[str, list[str]] = {}
    for family, changes in SHAPES:
        tried.setdefault(family, []).extend(f"`{name}={_short(value)}`" for name, value in changes.items())
    assert {family for family, _ in ADAPTED} == set(tried)
    lines = ["| model_type | tried plain, with LoRA on all linear layers, and with |", "|---|---|"]
    for family, settings in tried.items():
        lines.append(f"| {tiny_config(family).model_type} | {', '.join(dict.fromkeys(settings))} |")
    classes = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[tiny_config(family).model_type] for family in tried}
    assert classes == set(_FAMILIES)
    table = "\n".join(lines)
    assert table in PAGE, f"docs/generation.md should have this table:\n{table}"


def _short(value: Any) -> str:
    """A setting as the table has it: of a rotary scaling only its kind."""
    return str(value["rope_type"]) if isinstance(value, dict) else str(value)
