"""A batch with NaN is dropped for policy and critic alike; several in a row end the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_fast import PPOConfig, PPOTrainer
from rlhf_fast.errors import NonFiniteError
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


def poisoned_run(model: Path, folder: Path, steps: tuple[int, ...]) -> PoisonedPPO:
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
    )
    trainer = PoisonedPPO(config, reward=lambda prompts, completions, **columns: [len(text) for text in completions])
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
