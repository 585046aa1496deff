"""The demo's independent measure, as PPO loads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlhf_fast.rewards import load_reward

SOURCE = f"{Path(__file__).parents[3] / 'recipes/demo/rewards.py'}:real_word_pairs"


def test_real_word_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, completion in (("sft_train", "I like cake."), ("sft_eval", "我喜欢")):
        row = {"prompt": "?", "completion": completion}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    monkeypatch.setenv("RLHF_FAST_DEMO_DATA", str(tmp_path))
    replies = ["I like cake.", "i LIKE cake.", "我喜欢", "cake like I.", "", "I like I like cake."]
    scores = load_reward(SOURCE).score(["?"] * len(replies), replies).total
    torch.testing.assert_close(scores, torch.tensor([1, 1, 1, 1 / 5, 0, 6 / 7]))
