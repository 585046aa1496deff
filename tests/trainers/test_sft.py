"""SFT: the loss is the mean cross-entropy of the completions' tokens, however the rows are cut and packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_fast import SFTConfig, SFTTrainer
from rlhf_fast.models import head

from .conftest import read_metrics, write_jsonl

ROWS = [{"prompt": a * n, "completion": b * m} for a in "abc" for b in "xy" for n in (1, 3) for m in (1, 5, 9)]


def train(model: Path, folder: Path, **fields: object) -> list[dict[str, float]]:
    config = {
        "model_name_or_path": str(model),
        "train_data": write_jsonl(folder / "train.jsonl", ROWS),
        "eval_data": write_jsonl(folder / "eval.jsonl", ROWS[::5]),
        "output_dir": str(folder / "run"),
        "batch_size": len(ROWS),
        "max_steps": 1,
        "report_to": [],
    }
    SFTTrainer(SFTConfig(**(config | fields))).train()
    return read_metrics(folder / "run")


def plain_loss(model: Path, rows: list[dict[str, str]]) -> tuple[float, float]:
    """Mean cross-entropy of the completions' tokens, and the share of them that are the model's first guess."""
    tokenizer, policy = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    total, right, count = 0.0, 0, 0
    for row in rows:
        prompt, completion = (tokenizer(row[name], add_special_tokens=False).input_ids for name in row)
        ids = torch.tensor([*prompt, *completion, tokenizer.eos_token_id])
        with torch.no_grad():
            logits = policy(ids[None]).logits[0, len(prompt) - 1 : -1]
        total += float(F.cross_entropy(logits, ids[len(prompt) :], reduction="sum"))
        right += int((logits.argmax(-1) == ids[len(prompt) :]).sum())
        count += len(ids) - len(prompt)
    return total / count, right / count


@pytest.mark.parametrize("kept", [True, False], ids=["logits kept", "logits never whole"])
@pytest.mark.parametrize(
    "fields", [{}, {"micro_batch_tokens": 1}, {"padding_free": False}, {"ops_backend": "reference"}, {"zero_stage": 2}]
)
def test_loss_is_the_mean_cross_entropy_of_completions(
    fields: dict, kept: bool, letters_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "LOGITS_BYTES", 2**30 if kept else 0)
    (row,) = train(letters_model, tmp_path, learning_rate=1e-2, **fields)
    # The model of final/ is the trained one: its loss is what the last evaluation saw.
    for prefix, folder, rows in (
        ("", letters_model, ROWS),
        ("eval_before/", letters_model, ROWS[::5]),
        ("eval/", tmp_path / "run" / "final", ROWS[::5]),
    ):
        loss, accuracy = plain_loss(folder, rows)
        assert row[f"{prefix}loss"] == pytest.approx(loss, rel=1e-5)
        assert row[f"{prefix}mean_token_accuracy"] == pytest.approx(accuracy, rel=1e-5)


def test_packing_changes_neither_loss_nor_gradient(letters_model: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "packed").mkdir()
    (plain,) = train(letters_model, tmp_path / "plain")
    tokens = sum(len(row["prompt"]) + len(row["completion"]) + 1 for row in ROWS)
    length = tokens // 6  # the rows fill six sequences and begin a seventh
    options = {"packing": True, "max_length": length, "micro_batch_tokens": 40, "batch_size": 7}
    (packed,) = train(letters_model, tmp_path / "packed", **options)
    assert packed["epoch"] == 1.0
    for name in ("loss", "grad_norm", "num_tokens", "eval/loss"):
        assert packed[name] == pytest.approx(plain[name], rel=1e-4), name


def test_sft_learns_its_completions(letters_model: Path, tmp_path: Path) -> None:
    rows = train(letters_model, tmp_path, max_steps=60, learning_rate=1e-2)
    assert rows[-1]["eval/loss"] < 0.6 < rows[0]["eval_before/loss"]
