"""The reward trainer: Bradley-Terry with a margin, accuracy on held-out pairs, a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_fast import RewardConfig, RewardTrainer
from rlhf_fast.rewards import load_reward

from .conftest import read_metrics, write_jsonl

TRAIN = [
    {"prompt": p, "chosen": c * n, "rejected": "b" * m} for p in "xy" for c in "ac" for n in (1, 4) for m in (2, 7)
]
EVAL = [{"prompt": p, "chosen": "a" * n, "rejected": "b" * n} for p in "def" for n in (3, 5)]


def train(model: Path, folder: Path, rows: list[dict], **fields: object) -> list[dict[str, float]]:
    config = {
        "model_name_or_path": str(model),
        "train_data": write_jsonl(folder / "train.jsonl", rows),
        "eval_data": write_jsonl(folder / "eval.jsonl", EVAL),
        "output_dir": str(folder / "run"),
        "batch_size": len(rows),
        "max_steps": 1,
        "report_to": [],
    }
    RewardTrainer(RewardConfig(**(config | fields))).train()
    return read_metrics(folder / "run")


def scores(folder: Path, rows: list[dict], name: str) -> torch.Tensor:
    """transformers' own scores, one sequence at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return torch.stack(
            [
                model(torch.tensor([[*tokenizer(row["prompt"] + row[name]).input_ids, tokenizer.eos_token_id]])).logits[
                    0, 0
                ]
                for row in rows
            ]
        )


def test_reward_model_learns_and_scores_alike_everywhere(letters_model: Path, tmp_path: Path) -> None:
    rows = train(letters_model, tmp_path, TRAIN, max_steps=30, learning_rate=1e-2)
    assert rows[-1]["eval/accuracy"] == 1.0
    assert abs(rows[0]["eval_before/margin"]) < 0.5 < rows[-1]["eval/margin"]
    final = tmp_path / "run" / "final"
    chosen, rejected = scores(final, EVAL, "chosen"), scores(final, EVAL, "rejected")
    assert rows[-1]["eval/margin"] == pytest.approx(float((chosen - rejected).mean()), rel=1e-4)
    reward = load_reward(str(final))
    ours = reward.score([row["prompt"] for row in EVAL], [row["chosen"] for row in EVAL]).total
    torch.testing.assert_close(ours, chosen, rtol=1e-4, atol=1e-4)


def test_loss_is_bradley_terry_with_margin(letters_model: Path, tmp_path: Path) -> None:
    rows = [{**row, "margin": 0.5 * i} for i, row in enumerate(TRAIN)]
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    train(letters_model, tmp_path / "before", TRAIN, learning_rate=0.0)  # saves a scorer with its fresh head
    scorer = tmp_path / "before" / "run" / "final"
    (row,) = train(scorer, tmp_path / "after", rows, micro_batch_tokens=40, center_rewards_coefficient=0.1)
    chosen, rejected = scores(scorer, rows, "chosen"), scores(scorer, rows, "rejected")
    margin = torch.tensor([row["margin"] for row in rows])
    loss = (torch.log1p(torch.exp(-(chosen - rejected - margin))) + 0.1 * (chosen + rejected) ** 2).mean()
    assert row["loss"] == pytest.approx(float(loss), rel=1e-5)
    every = torch.cat([chosen, rejected])
    for name, value in (("min", every.min()), ("mean", every.mean()), ("max", every.max())):
        assert row[f"{name}_reward"] == pytest.approx(float(value), rel=1e-4, abs=1e-6)


def test_padding_changes_nothing(letters_model: Path, tmp_path: Path) -> None:
    runs = []
    for padding_free in (True, False):
        folder = tmp_path / str(padding_free)
        folder.mkdir()
        rows = train(
            letters_model,
            folder,
            TRAIN,
            padding_free=padding_free,
            micro_batch_tokens=50,
            learning_rate=1e-2,
            max_steps=3,
        )
        runs.append((rows, AutoModelForSequenceClassification.from_pretrained(folder / "run" / "final").state_dict()))
    (mine, ours), (theirs, padded) = runs
    for a, b in zip(mine, theirs, strict=True):
        for name in ("loss", "grad_norm", "margin", "min_reward", "max_reward", "num_tokens"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), (a["step"], name)
    assert mine[-1]["eval/loss"] == pytest.approx(theirs[-1]["eval/loss"], rel=1e-4)
    for name, weight in padded.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-5)
