"""PPO-ptx: supervised tokens in the policy's loss, against plain PyTorch in float64; what is read when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_fast import PPOConfig, PPOTrainer
from rlhf_fast.errors import ConfigError, DataError
from rlhf_fast.models import head

from .conftest import count_a, ppo_settings, read_metrics, save_letters_model, write_jsonl

COEF, END = 3.0, 1  # END: the id of <end>
ROWS = [  # rows of unsup_data, and what each is to a model: ids, and the first one that is learnt
    ({"text": "abc"}, [2, 3, 4, END], 1),
    ({"text": "f"}, [7, END], 1),
    ({"prompt": "ab", "completion": "xyxyxyx"}, [2, 3, 8, 9, 8, 9, 8, 9, 8, END], 2),
    ({"prompt": "d", "completion": "e"}, [5, 6, END], 1),
]


def make_trainer(model: Path, folder: Path, **fields: Any) -> PPOTrainer:
    settings = {
        "unsup_data": write_jsonl(folder / "texts.jsonl", [row for row, _, _ in ROWS]),
        "unsup_coef": COEF,
        "batch_size": 4,
        "max_steps": 1,
    }
    return PPOTrainer(PPOConfig(**ppo_settings(model, folder, **{**settings, **fields})), reward=count_a)


def gradients(trainer: PPOTrainer) -> dict[str, Tensor]:
    """Of the policy, by name, which are then forgotten."""
    parameters = trainer.models.causal_lm.named_parameters()
    found = {name: parameter.grad.clone() for name, parameter in parameters if parameter.grad is not None}
    trainer.models.policy.zero_grad()
    return found


@pytest.mark.parametrize("value_model", ["separate", "shared"])
@pytest.mark.parametrize(("micro_batch_tokens", "logits_bytes"), [(1, 0), (12, 2**30), (100000, 2**30)])
def test_gradients_equal_plain_pytorch(
    micro_batch_tokens: int, logits_bytes: int, value_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "LOGITS_BYTES", logits_bytes)
    path = save_letters_model(tmp_path / "policy", seed=1, dtype=torch.float64)
    fields = {"micro_batch_tokens": micro_batch_tokens, "value_model": value_model, "dtype": "float64"}
    trainer = make_trainer(path, tmp_path, **fields)
    assert trainer.ptx is not None
    metrics = trainer.ptx.accumulate(trainer.models.policy)  # a batch of 4: each row once
    mixed = gradients(trainer)

    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    losses = [
        F.cross_entropy(
            plain(torch.tensor([ids])).logits[0, start - 1 : -1], torch.tensor(ids[start:]), reduction="sum"
        )
        for _, ids, start in ROWS
    ]
    mean = sum(losses) / sum(len(ids) - start for _, ids, start in ROWS)
    (COEF * mean).backward()
    assert metrics == {"loss/ptx_avg": pytest.approx(float(mean.detach()), rel=1e-12)}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(mixed[name], parameter.grad, rtol=1e-9, atol=1e-11)

    # A step's gradient is PPO's own plus that.
    prompts = trainer.next_prompts()
    experience = trainer.experience(trainer.score(prompts, trainer.rollout(prompts, 1)))
    trainer.accumulate(experience)
    alone = gradients(trainer)
    trainer.ptx.accumulate(trainer.models.policy)
    trainer.accumulate(experience)
    for name, gradient in gradients(trainer).items():
        torch.testing.assert_close(gradient, alone[name] + mixed[name], rtol=1e-9, atol=1e-11)


def test_what_is_mixed_in_is_learnt(letters_model: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"max_steps": 3, "num_mini_batches": 2, "learning_rate": 1e-2}
    trainer = make_trainer(letters_model, tmp_path, **fields)
    trainer.train()
    losses = [row["loss/ptx_avg"] for row in read_metrics(tmp_path / "run")]
    assert losses[2] < losses[0] - 0.1
    assert trainer.ptx is not None
    assert trainer.ptx.order.position == 3 * 4  # two rows for each of six optimiser steps
    (tmp_path / "without").mkdir()
    make_trainer(letters_model, tmp_path / "without", unsup_data=None, unsup_coef=0.0).train()
    assert "loss/ptx_avg" not in read_metrics(tmp_path / "without" / "run")[0]


def test_a_shared_trunk_in_parts_is_the_same_run(letters_model: Path, tmp_path: Path) -> None:
    """Under ZeRO every weight has a gradient in every micro-batch, the value head's in those of the mixture too."""
    rows = {}
    for stage in (0, 2, 3):
        folder = tmp_path / str(stage)
        folder.mkdir()
        fields: dict[str, Any] = {"value_model": "shared", "zero_stage": stage, "max_steps": 2, "learning_rate": 1e-3}
        make_trainer(letters_model, folder, micro_batch_tokens=12, **fields).train()
        rows[stage] = read_metrics(folder / "run")
    for stage in (2, 3):
        for mine, whole in zip(rows[stage], rows[0], strict=True):
            for name in ("loss/ptx_avg", "loss/policy_avg", "loss/value_avg", "grad_norm"):
                assert mine[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-5), name


def test_bad_rows_and_limits_are_those_of_other_data(letters_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"bad\.jsonl:2: field 'text': only white space"):
        make_trainer(
            letters_model, tmp_path, unsup_data=write_jsonl(tmp_path / "bad.jsonl", [{"text": "a"}, {"text": " "}])
        )
    long = write_jsonl(tmp_path / "long.jsonl", [{"text": "ab" * 40}])
    trainer = make_trainer(letters_model, tmp_path, unsup_data=long, max_length=10)
    assert trainer.ptx is not None
    assert [len(row.input_ids) for row in trainer.ptx.rows] == [10]
    with pytest.raises(ConfigError, match="unsup_data: no file or folder"):
        make_trainer(letters_model, tmp_path, unsup_data=str(tmp_path / "nothing.jsonl"))
