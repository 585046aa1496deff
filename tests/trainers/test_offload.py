"""What is offloaded: when frozen weights are fetched, and that no number changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from rlhf_fast import PPOConfig, PPOTrainer
from rlhf_fast.errors import ConfigError
from rlhf_fast.models import OffloadedWeights
from rlhf_fast.rewards import ModelReward
from tests.engine_cases import offloading

from .conftest import ppo_settings, repeatable_metrics

OFFLOAD = {"offload_ref": True, "offload_reward": True}


def make_trainer(model: Path, folder: Path, **fields: Any) -> PPOTrainer:
    folder.mkdir(exist_ok=True)
    short = {"micro_batch_tokens": 16, "learning_rate": 1e-3, "max_steps": 2}
    return PPOTrainer(PPOConfig(**ppo_settings(model, folder, **{**short, **fields})))


def test_weights_are_fetched_once_for_each_time_they_are_asked(
    letters_model: Path, reward_model: Path, tmp_path: Path
) -> None:
    make_trainer(letters_model, tmp_path / "stay", reward=str(reward_model)).train()
    trainer = make_trainer(letters_model, tmp_path / "go", reward=str(reward_model), **OFFLOAD)
    reference, reward = trainer.models.reference, trainer.reward
    assert reference is not None
    assert isinstance(reward, ModelReward)
    # As on a GPU, with a second copy in the host's memory for the GPU's.
    cpu = torch.device("cpu")
    trainer.models.reference_loaded = OffloadedWeights(reference, cpu).loaded
    reward.loaded = OffloadedWeights(reward.model, cpu).loaded
    asked: list[tuple[str, int]] = []
    for name, module in (("reference", reference), ("reward", reward.model)):
        home = next(module.parameters()).data_ptr()

        def note(module: torch.nn.Module, inputs: Any, name: str = name, home: int = home) -> None:
            place = next(module.parameters()).data_ptr()
            assert place != home
            if (name, place) not in asked[-1:]:
                asked.append((name, place))

        module.register_forward_pre_hook(note)
    trainer.train()
    assert [name for name, _ in asked] == ["reward", "reference"] * 2  # one copy for all micro-batches of a step
    assert repeatable_metrics(tmp_path / "go" / "run") == repeatable_metrics(tmp_path / "stay" / "run")


def test_on_a_cpu_they_stay_and_no_number_changes(letters_model: Path, reward_model: Path, tmp_path: Path) -> None:
    for name, offload in (("stay", {}), ("go", OFFLOAD)):
        make_trainer(letters_model, tmp_path / name, reward=str(reward_model), **offload).train()
    assert repeatable_metrics(tmp_path / "go" / "run") == repeatable_metrics(tmp_path / "stay" / "run")


@pytest.mark.parametrize("home", ["host", "disk"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ppo_with_all_of_zero_3_elsewhere(
    letters_model: Path,
    reward_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    home: Literal["host", "disk"],
) -> None:
    settings = {"reward": str(reward_model), "zero_stage": 3, "dtype": dtype, "kl_coef": 0.1}
    make_trainer(letters_model, tmp_path / "stay", **settings).train()
    monkeypatch.setattr("rlhf_fast.engine.memory_apart", lambda world: True)  # DeepSpeed offloads from a CPU too
    settings |= offloading(3, home, tmp_path / "disk")
    make_trainer(letters_model, tmp_path / "go", **settings).train()
    stay, go = (repeatable_metrics(tmp_path / name / "run") for name in ("stay", "go"))
    assert len(go) == 2
    for mine, theirs in zip(go, stay, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    names = [tmp_path / name / "run" / "final" / "model.safetensors" for name in ("stay", "go")]
    theirs, mine = (load_file(name) for name in names)
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-5 if dtype == "float32" else 1e-2, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"offload_ref": True, "kl_coef": 0.0}, "offload_ref: with kl_coef 0 there is no reference"),
        ({"offload_ref": True, "use_peft": True}, "offload_ref: the reference is the policy with its adapters off"),
        ({"offload_reward": True}, "offload_reward: none of the rewards is a model's folder"),
        ({"reward_zero_stage": 3}, "reward_zero_stage: none of the rewards is a model's folder"),
        ({"reward_zero_stage": 3, "offload_reward": True}, "reward_zero_stage: with offload_reward its weights are on"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_nothing_to_offload_is_an_error(
    fields: dict[str, Any], message: str, letters_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "judge.py").write_text("def score(completions, **_):\n    return [0.0 for _ in completions]\n")
    with pytest.raises(ConfigError, match=f"^{message}"):
        make_trainer(letters_model, tmp_path / "run", reward=f"{tmp_path / 'judge.py'}:score", **fields)
