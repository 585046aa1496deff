"""A batch with NaN or a spike is dropped, for policy and critic alike; several in a row end the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from rlhf_fast.errors import NonFiniteError, RewardError
from rlhf_fast.trainers.experience import Experience, Scored

from .conftest import read_metrics, write_jsonl


class PoisonedPPO(PPOTrainer):
    """The critic's returns are NaN in some steps; the policy's part is whole."""

    poisoned: tuple[int, ...] = ()

    def experience(self, scored: Scored) -> Experience:
        experience = super().experience(scored)
        self.before = [p.detach().clone() for p in self.trained()]
        if self.run.step in self.poisoned:
            experience.returns[0, 0] = float("nan")
        return experience

    def trained(self) -> list[torch.Tensor]:
        return [*self.models.policy_module.parameters(), *self.models.critic_module.parameters()]

    def update(self, experience: Experience, step: int) -> None:
        super().update(experience, step)
        moved = [not torch.equal(a, b) for a, b in zip(self.before, self.trained(), strict=True)]
        assert any(moved) == (step not in self.poisoned)


def length(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    return [len(text) for text in completions]


def poisoned_run(
    model: Path, folder: Path, steps: tuple[int, ...], reward: Callable[..., Any] = length, **fields: Any
) -> PoisonedPPO:
    config = PPOConfig(
        model_name_or_path=str(model),
        train_data=write_jsonl(folder / "prompts.jsonl", [{"prompt": p} for p in "abxy"]),
        output_dir=str(folder / "run"),
        batch_size=8,
        max_new_tokens=4,
        learning_rate=1e-2,
        warmup_ratio=0.0,
        max_steps=6,
        report_to=[],
        **fields,
    )
    trainer = PoisonedPPO(config, reward=reward)
    trainer.poisoned = steps
    return trainer


def test_a_bad_batch_changes_nothing_and_is_counted(letters_model: Path, tmp_path: Path) -> None:
    poisoned_run(letters_model, tmp_path, (2, 3, 5)).train()
    rows = read_metrics(tmp_path / "run")
    assert [row["nonfinite_steps"] for row in rows] == [0, 1, 2, 2, 3, 3]


def test_three_in_a_row_end_the_run(letters_model: Path, tmp_path: Path) -> None:
    trainer = poisoned_run(letters_model, tmp_path, (3, 4, 5))
    with pytest.raises(NonFiniteError, match=r"3 optimiser steps in a row.*step 5"):
        trainer.train()
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert all(p.isfinite().all() for p in trainer.trained())


def fails(*calls: int) -> Callable[..., list[float]]:
    """A reward that gives NaN in some of its calls."""
    count = 0

    def reward(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
        nonlocal count
        count += 1
        return [float("nan") if count in calls else float(len(text)) for text in completions]

    return reward


def test_a_failed_reward_ends_the_run_or_costs_its_batch(
    letters_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RewardError, match=r"returned nan at row 0"):
        poisoned_run(letters_model, tmp_path, (), fails(2)).train()
    poisoned_run(letters_model, tmp_path, (), fails(2, 3, 5), on_bad_reward="skip").train()
    assert [row["nonfinite_steps"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2, 2, 3, 3]
    assert "step 5: reward test_nonfinite.py:reward returned nan at row 0" in capsys.readouterr().err
    with pytest.raises(NonFiniteError, match=r"3 optimiser steps in a row.*step 4, where the reward failed"):
        poisoned_run(letters_model, tmp_path, (), fails(2, 3, 4), on_bad_reward="skip").train()


def test_a_failed_reward_costs_its_evaluation(letters_model: Path, tmp_path: Path) -> None:
    held_out = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "a"}])
    poisoned_run(letters_model, tmp_path, (), fails(1), on_bad_reward="skip", eval_data=held_out).train()
    rows = read_metrics(tmp_path / "run")
    assert "eval_before/scores" not in rows[0]
    assert "eval/scores" in rows[-1]
    assert rows[-1]["nonfinite_steps"] == 0


def test_a_spike_costs_its_step(letters_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def spiky(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
        nonlocal count
        count += 1
        return [len(text) * (1e4 if count == 3 else 1.0) for text in completions]

    count = 0
    poisoned_run(letters_model, tmp_path, (3,), spiky, skip_grad_norm=1e3, whiten_advantages=False).train()
    assert [row["nonfinite_steps"] for row in read_metrics(tmp_path / "run")] == [0, 0, 1, 1, 1, 1]
    assert "its norm is above 1000 (skip_grad_norm); the batch was dropped" in capsys.readouterr().err


SUPERVISED = [
    (SFTTrainer, SFTConfig, {"prompt": "ab", "completion": "xy"}),
    (RewardTrainer, RewardConfig, {"prompt": "ab", "chosen": "xx", "rejected": "y"}),
]


@pytest.mark.parametrize(("kind", "config", "row"), SUPERVISED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_cost_their_step(
    kind: Any, config: Any, row: dict[str, str], bad: float, letters_model: Path, tmp_path: Path
) -> None:
    trainer = kind(
        config(
            model_name_or_path=str(letters_model),
            train_data=write_jsonl(tmp_path / "rows.jsonl", [row] * 8),
            output_dir=str(tmp_path / "run"),
            batch_size=4,
            max_steps=4,
            learning_rate=1e-2,
            warmup_ratio=0.0,
            report_to=[],
        )
    )

    def poison(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * bad if trainer.run.step == 2 else output

    trainer.model.model.norm.register_forward_hook(poison)
    trainer.train()
    rows = read_metrics(tmp_path / "run")
    assert [row["nonfinite_steps"] for row in rows] == [0, 1, 1, 1]
    assert rows[1]["lr"] == rows[2]["lr"]  # the schedule stood still
    assert all(p.isfinite().all() for p in trainer.model.parameters())
