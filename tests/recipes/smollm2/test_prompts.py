"""The recipe's prompts: what is held out is unseen, and a run can read them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rlhf_fast.data import load_rows

SCRIPT = Path(__file__).parents[3] / "recipes/smollm2/prompts.py"


@pytest.fixture(scope="module")
def prompts() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smollm2_prompts", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, SCRIPT, "--output_dir", folder], check=True, capture_output=True)
    return folder / "data"


def test_nothing_held_out_is_trained_on(prompts: ModuleType, data: Path) -> None:
    keys = {}
    for name in ("train", "eval"):
        rows = load_rows(str(data / f"prompts_{name}.jsonl"), kind="prompt", on_bad_row="error")
        keys[name] = [prompts.key(row["prompt"]) for row in rows]
        assert len(set(keys[name])) == len(keys[name])
    assert not set(keys["train"]) & set(keys["eval"])
    assert len(keys["eval"]) == 128
    assert len(keys["train"]) > 400


def test_prompts_are_what_somebody_said(prompts: ModuleType, data: Path) -> None:
    turns = {row["prompt"] for row in prompts.read_prompts(prompts.corpus_folder())}
    written = [json.loads(line) for line in (data / "prompts_eval.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["prompt"] for row in written} <= turns
    assert not {row["category"] for row in written} & prompts.NOT_DIALOGUE


def test_same_seed_same_bytes(data: Path, tmp_path: Path) -> None:
    for folder, seed in ((tmp_path / "same", "0"), (tmp_path / "other", "1")):
        subprocess.run([sys.executable, SCRIPT, "--output_dir", folder, "--seed", seed], check=True)
    for name in ("train", "eval"):
        file = f"prompts_{name}.jsonl"
        assert (tmp_path / "same/data" / file).read_bytes() == (data / file).read_bytes()
        assert (tmp_path / "other/data" / file).read_bytes() != (data / file).read_bytes()


def test_odd_conversations(prompts: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(
        'conversations:\n- - "  Hello,\\n  you! "\n  - Hi\n- - hello you\n  - Hi\n- just a string\n'
        f"- - '?!'\n  - What?\n- - {'long ' * 40}\n  - No.\n- - 42\n  - Why?\n",
        encoding="utf-8",
    )
    (tmp_path / "coding.yml").write_text("conversations:\n- - Sort a list.\n  - sorted(x)\n", encoding="utf-8")
    assert [row["prompt"] for row in prompts.read_prompts(tmp_path)] == ["Hello, you!", "42"]
