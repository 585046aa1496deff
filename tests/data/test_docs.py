"""Every example in docs/data.md is run: its rows load and encode, its code runs, its message is what a user gets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlhf_fast.data import ChatFormat, load_rows, preference_dataset, prompt_dataset, sft_dataset
from rlhf_fast.errors import DataError
from tests.conftest import byte_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+) ?(\w*)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def block(language: str, kind: str = "") -> str:
    (body,) = [body for name, info, body in BLOCKS if (name, info) == (language, kind)]
    return body


def test_all_blocks_are_run_here() -> None:
    kinds = ["sft", "preference", "prompt", "unsup"]
    assert [b[:2] for b in BLOCKS] == [*(("jsonl", kind) for kind in kinds), ("python", ""), ("text", "")]


def test_sft_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(block("jsonl", "sft"), encoding="utf-8")
    examples = sft_dataset(load_rows(str(path), kind="sft"), ChatFormat(byte_tokenizer(True)), max_length=99)
    assert len(examples) == 3


def test_preference_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(block("jsonl", "preference"), encoding="utf-8")
    rows = load_rows(str(path), kind="preference")
    examples = preference_dataset(rows, ChatFormat(byte_tokenizer(True)), max_length=99)
    assert [e.margin for e in examples] == [0.0, 1.5, 0.0, 0.0]
    assert examples[2] == examples[3]  # with and without a prompt of its own


def test_prompt_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(block("jsonl", "prompt"), encoding="utf-8")
    chat = ChatFormat(byte_tokenizer(True))
    examples = prompt_dataset(load_rows(str(path), kind="prompt"), chat, max_prompt_length=99)
    assert [e.columns for e in examples] == [{"answer": 42, "level": "easy"}, {"answer": 12, "level": None}]


def test_unsup_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(block("jsonl", "unsup"), encoding="utf-8")
    tokenizer = byte_tokenizer(True)
    text, pair = sft_dataset(load_rows(str(path), kind="unsup"), ChatFormat(tokenizer), max_length=99)
    assert tokenizer.decode(text.input_ids) == "The Nile is a river in Africa.<|end|>"
    assert text.loss_mask == [False] + [True] * 30
    learnt = [token for token, wanted in zip(pair.input_ids, pair.loss_mask, strict=True) if wanted]
    assert tokenizer.decode(learnt) == " Paris.<|end|>"


def test_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sft.jsonl").write_text(block("jsonl", "sft"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    exec(block("python"), {})


def test_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good, bad = {"prompt": "a", "completion": "b"}, {"prompt": "a", "response": "b"}
    Path("data").mkdir()
    Path("data/train.jsonl").write_text("\n".join(map(json.dumps, [good] * 6 + [bad])), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_rows("data/train.jsonl", kind="sft")
    assert str(caught.value) == block("text").strip()
