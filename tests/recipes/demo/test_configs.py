"""The demo's configs are configs; the one with LoRA is its PPO but for the adapters."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from rlhf_fast.config import PPOConfig, RewardConfig, SFTConfig, TrainerConfig
from rlhf_fast.config_loading import config_differences, load_config

FOLDER = Path(__file__).parents[3] / "recipes" / "demo"


@pytest.mark.parametrize(
    ("name", "cls"), [("sft", SFTConfig), ("reward", RewardConfig), ("ppo", PPOConfig), ("ppo_lora", PPOConfig)]
)
def test_it_loads(name: str, cls: type[TrainerConfig]) -> None:
    assert load_config(cls, FOLDER / f"{name}.yaml").output_dir == f"runs/demo/{name}"


def test_ppo_with_lora_is_the_demos_ppo() -> None:
    plain, lora = (asdict(load_config(PPOConfig, FOLDER / f"{name}.yaml")) for name in ("ppo", "ppo_lora"))
    differences = set(config_differences(plain, lora))
    assert differences == {"output_dir", "use_peft", "lora_target_modules", "learning_rate", "value_learning_rate"}
