"""The demo's evaluation must be able to say no: a policy that PPO did not change has not gained anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from rlhf_fast.models import load_scalar_model, load_tokenizer, save_model

SCRIPT = Path(__file__).parents[3] / "recipes/demo/evaluate.py"


def write(file: Path, rows: list[dict[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def test_no_change_is_no_success(tiny_chat_llama: Path, tmp_path: Path) -> None:
    for name in ("sft", "ppo"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "final").symlink_to(tiny_chat_llama)
    torch.manual_seed(0)
    judge = load_scalar_model(tiny_chat_llama, dtype="float32")
    save_model(judge, load_tokenizer(tiny_chat_llama), tmp_path / "reward/final")
    texts = ["Hi", "Who are you?", "你好", "What do you like to do?", "谁是你妈妈", "Robots", "Tell me more", "机器人"]
    pairs = [{"prompt": text, "completion": f"{text}?"} for text in texts]
    write(tmp_path / "data/sft_train.jsonl", pairs)
    write(tmp_path / "data/sft_eval.jsonl", pairs)
    write(tmp_path / "data/prompts_eval.jsonl", [{"prompt": text, "language": "english"} for text in texts])
    write(
        tmp_path / "data/preference_eval.jsonl",
        [{"prompt": text, "chosen": "I do.", "rejected": "do I", "damage": "shuffled"} for text in texts],
    )

    done = subprocess.run(
        [sys.executable, SCRIPT, "--output_dir", tmp_path, "--max_new_tokens", "8"], capture_output=True, text=True
    )

    result = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert done.returncode == 1, done.stderr
    assert "not shown" in done.stderr
    assert result["passed"] is False
    assert result["completions"] == 2 * len(texts)
    assert result["gain"] == 0
    assert result["ppo"]["KL to SFT, nats a reply"] == 0
    assert result["sft"] == result["ppo"]
