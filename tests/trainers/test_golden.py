"""The trainer's advantages and losses on numbers worked out with DeepSpeed-Chat's own code.

The models' outputs are given; all that comes after them is the trainer's own path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast import PPOConfig, PPOTrainer, ops
from rlhf_fast.data import PromptExample
from rlhf_fast.generation import Rollout
from rlhf_fast.rewards import RewardScores
from rlhf_fast.trainers.experience import Scored

from .conftest import write_jsonl

# Response columns of two rows; prompts have three tokens (the first row's first one is padding).
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
LOGPROBS = torch.tensor([[-0.5, -0.7, -3, -4], [-0.2, -0.9, -1.1, -0.3]], dtype=torch.float64)
REFERENCE = torch.tensor([[-0.6, -0.5, -2, -4], [-0.3, -0.8, -1.4, -0.1]], dtype=torch.float64)
VALUES = torch.tensor([[0.3, 0.4, 0.9, -0.5], [0.2, 0.1, 0.3, 0.5]], dtype=torch.float64)
NEW_LOGPROBS = LOGPROBS + torch.tensor([[0.3, -0.1, 0.5, 0], [0.05, -0.4, 0.1, 0.02]], dtype=torch.float64)
NEW_VALUES = VALUES + torch.tensor([[0.5, -0.1, 0.7, 0], [-0.3, 0.1, 0.05, 0.4]], dtype=torch.float64)
SCORES = torch.tensor([7.0, -1.5])

GOLDEN = {
    "default": (
        [[4.479, 4.62, 0, 0], [-1.4546775, -1.41545, -1.711, -1.98]],
        [[4.779, 5.02, 0, 0], [-1.2546775, -1.31545, -1.411, -1.48]],
        -0.4970970611578647,
        4.43538052762552,
    ),
    "dschat": (
        [[4.3745, 4.51, 4.2, 0], [-1.4546775, -1.41545, -1.711, -1.98]],
        [[4.6745, 4.91, 5.1, 0], [-1.2546775, -1.31545, -1.411, -1.48]],
        -0.4596083751605389,
        4.276239631792188,
    ),
}


class GivenPolicy:
    """In place of the policy's engine: the given log-probs are those of `ids`, one other token has the rest."""

    def __call__(
        self,
        input_ids: Tensor,
        rows: Tensor,
        positions: Tensor,
        ids: Tensor,
        *,
        lengths: list[int],
        ops_backend: str,
        **ppo_loss: Any,
    ) -> ops.PPOLoss:
        given = NEW_LOGPROBS[MASK]
        logits = torch.full((len(ids), 10), -torch.inf, dtype=torch.float64)
        logits[:, 0] = torch.log1p(-given.exp())
        logits[torch.arange(len(ids)), ids] = given
        return ops.logits_ppo_loss(logits, ids, backend=ops_backend, **ppo_loss)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        pass


class GivenCritic:
    """In place of the critic's engine."""

    def __call__(self, input_ids: Tensor, rows: Tensor, positions: Tensor, *, lengths: list[int]) -> Tensor:
        return NEW_VALUES[MASK]

    def backward(self, loss: Tensor, *, last: bool) -> None:
        pass


@pytest.mark.parametrize("semantics", ["default", "dschat"])
def test_golden_case(semantics: str, letters_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PPOConfig(
        model_name_or_path=str(letters_model),
        train_data=write_jsonl(tmp_path / "p.jsonl", [{"prompt": "abc"}] * 2),
        output_dir=str(tmp_path / "run"),
        semantics=semantics,
        kl_coef=0.1,
        clip_score=5.0,
        whiten_advantages=False,
        batch_size=2,
        max_steps=1,
        report_to=[],
    )
    trainer = PPOTrainer(config, reward=len)
    rollout = Rollout(
        prompt_ids=[[3, 4], [3, 4, 5]],
        tokens=torch.where(MASK, 6, 0),
        mask=MASK,
        logprobs=torch.where(MASK, LOGPROBS, 0),
        sampled_logprobs=torch.where(MASK, LOGPROBS, 0),
        finish_reasons=["stop", "stop"],
    )

    def forward(rollout: Rollout, mask: Tensor, *, logprobs: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        outputs = [torch.where(mask, x, 0) for x in (REFERENCE, VALUES, LOGPROBS)]
        return outputs[0], outputs[1], outputs[2] if logprobs else None

    monkeypatch.setattr(trainer.models, "forward", forward)
    monkeypatch.setattr(trainer.models, "policy", GivenPolicy())
    monkeypatch.setattr(trainer.models, "critic", GivenCritic())

    prompts = [PromptExample(prompt_ids=ids, prompt="", columns={}) for ids in rollout.prompt_ids]
    experience = trainer.experience(Scored(prompts, rollout, ["", ""], RewardScores(SCORES, {})))
    stats = trainer.losses(experience, MASK.sum(), last=True)

    advantages, returns, actor_loss, critic_loss = GOLDEN[semantics]
    torch.testing.assert_close(experience.advantages, torch.tensor(advantages, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(experience.returns, torch.tensor(returns, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(stats["loss/policy_avg"]) == pytest.approx(actor_loss, abs=1e-12)
    assert float(stats["loss/value_avg"]) == pytest.approx(critic_loss, abs=1e-12)
