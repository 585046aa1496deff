"""The value model's warm-up: the policy does not move, and afterwards it trains as in a run of its own length."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast import PPOConfig, PPOTrainer
from rlhf_fast.errors import ConfigError

from .conftest import count_a, ppo_settings, read_metrics, write_jsonl

OF_POLICY = {"lr", "grad_norm", "loss/policy_avg", "policy/entropy_avg", "rollout/logprob_drift_max", "loss/ptx_avg"}
OF_CRITIC = {"value/grad_norm", "loss/value_avg", "val/clipfrac_avg"}


def make_trainer(model: Path, folder: Path, *, resume: bool = False, **fields: Any) -> PPOTrainer:
    settings = {
        "unsup_data": write_jsonl(folder / "texts.jsonl", [{"text": "xy"}]),
        "unsup_coef": 0.1,
        "num_mini_batches": 2,
        "critic_warmup": 2,
        "max_steps": 5,
        "kl_target": 0.1,
        "target_kl": 100.0,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.0,
    }
    return PPOTrainer(PPOConfig(**ppo_settings(model, folder, **{**settings, **fields})), reward=count_a, resume=resume)


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_critic_learns_alone_at_first(letters_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(letters_model, tmp_path)
    policy, critic = trainer.models.policy_module, trainer.models.critic_module
    assert critic is not None
    seen = [(weights(policy), weights(critic))]
    update = trainer.update

    def watched(*arguments: Any) -> None:
        update(*arguments)
        seen.append((weights(policy), weights(critic)))

    trainer.update = watched  # type: ignore[method-assign]
    trainer.train()
    moved = [(not equal(a, c), not equal(b, d)) for (a, b), (c, d) in itertools.pairwise(seen)]
    assert moved == [(False, True), (False, True), (True, True), (True, True), (True, True)]

    rows = read_metrics(tmp_path / "run")
    for row in rows:
        assert row.keys() >= OF_CRITIC
        assert row.keys() >= OF_POLICY if row["step"] > 2 else not row.keys() & OF_POLICY
    # The policy's schedule is that of its own three steps of two updates each; a row has the mean of its two.
    assert [row["lr"] for row in rows[2:]] == pytest.approx([1e-3 * x / 12 for x in (11, 7, 3)])
    assert [row["objective/kl_coef"] for row in rows[:3]] == [0.05] * 3  # nothing to steer before the policy moves
    assert rows[3]["objective/kl_coef"] != 0.05
    assert trainer.ptx is not None
    assert trainer.ptx.order.position == 3 * 8


@pytest.mark.parametrize("fields", [{}, {"dtype": "bfloat16", "zero_stage": 3, "enable_ema": True}], ids=str)
def test_a_run_cut_during_the_warmup_goes_on_with_the_same_bits(
    fields: dict[str, Any], letters_model: Path, tmp_path: Path
) -> None:
    whole = make_trainer(letters_model, tmp_path, save_steps=1, save_total_limit=3, max_steps=3, **fields)
    whole.train()
    for step in (2, 3):
        (tmp_path / "run" / "checkpoints" / f"step-{step}" / "manifest.json").unlink(missing_ok=True)
    assert (tmp_path / "run" / "checkpoints" / "step-1").exists()
    again = make_trainer(letters_model, tmp_path, save_steps=1, max_steps=3, resume=True, **fields)
    assert again.run.step == 1
    again.train()
    for a, b in zip(whole.run.engines.values(), again.run.engines.values(), strict=True):
        with a.gathered(), b.gathered():
            assert equal(weights(a.module), weights(b.module))


def test_warmups_that_cannot_be(letters_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^critic_warmup: the value loss moves a shared trunk"):
        make_trainer(letters_model, tmp_path, value_model="shared")
    with pytest.raises(ConfigError, match=r"^critic_warmup: in all 2 steps of the run the policy would learn nothing"):
        make_trainer(letters_model, tmp_path, max_steps=None, num_train_epochs=2)
