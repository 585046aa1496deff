"""PPO reaches a known best answer, and goes the other way when the advantages are negated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_fast import PPOConfig, PPOTrainer
from rlhf_fast.trainers.experience import Experience, Scored

from .conftest import read_metrics, write_jsonl

LENGTH = 6


def only_a(prompts, completions, **columns):
    """Best answer: the letter a, LENGTH times."""
    return [text.count("a") / LENGTH for text in completions]


def long(prompts, completions, **columns):
    """Best answer: no end before the cap."""
    return [len(text) / LENGTH for text in completions]


def two_arms(prompts, completions, **columns):
    """Best answer: a after x, b after y."""
    right = {"x": "a", "y": "b"}
    return [float(text.startswith(right[prompt])) for prompt, text in zip(prompts, completions, strict=True)]


class NegatedPPO(PPOTrainer):
    """The same loop with the sign of the advantages flipped."""

    def experience(self, scored: Scored) -> Experience:
        experience = super().experience(scored)
        experience.advantages = -experience.advantages
        return experience


def final_score(
    trainer: type[PPOTrainer], reward: Callable, seed: int, model: Path, folder: Path, max_steps: int = 40
) -> tuple[float, float]:
    """Train; returns the held-out score before and after."""
    config = PPOConfig(
        model_name_or_path=str(model),
        train_data=write_jsonl(folder / "prompts.jsonl", [{"prompt": "x"}, {"prompt": "y"}]),
        eval_data=write_jsonl(folder / "eval.jsonl", [{"prompt": "x"}, {"prompt": "y"}] * 32),
        output_dir=str(folder / "run"),
        batch_size=64,
        num_generations=1,
        max_new_tokens=LENGTH,
        learning_rate=5e-3,
        value_learning_rate=5e-3,
        num_ppo_epochs=2,
        kl_coef=0.0,
        max_steps=max_steps,
        seed=seed,
        report_to=[],
    )
    trainer(config, reward=reward).train()
    rows = read_metrics(folder / "run")
    return rows[0]["eval_before/scores"], rows[-1]["eval/scores"]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("reward", [only_a, long, two_arms])
def test_ppo_reaches_the_best_answer(reward: Callable, seed: int, letters_model: Path, tmp_path: Path) -> None:
    before, after = final_score(PPOTrainer, reward, seed, letters_model, tmp_path)
    assert before < 0.8
    assert after > 0.95


@pytest.mark.parametrize("reward", [only_a, long, two_arms])
def test_negated_advantages_lead_away_from_it(reward: Callable, letters_model: Path, tmp_path: Path) -> None:
    before, after = final_score(NegatedPPO, reward, 0, letters_model, tmp_path)
    assert after < min(before, 0.1)
