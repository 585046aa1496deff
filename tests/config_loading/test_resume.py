"""What a resumed run may change."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.config import PPOConfig, RewardConfig, SFTConfig, TrainerConfig
from rlhf_fast.config_loading import check_resume, config_differences, save_config
from rlhf_fast.config_loading.resume import MAY_CHANGE, MAY_NOT_CHANGE
from rlhf_fast.errors import ConfigError


def ppo(**values: Any) -> PPOConfig:
    return PPOConfig(**{"model_name_or_path": "m", "train_data": "d", "reward": "a.py:f"} | values)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    save_config(ppo(), tmp_path / "config.yaml")
    return tmp_path / "config.yaml"


def test_every_field_is_in_one_of_the_tables() -> None:
    fields = {field.name for cls in (SFTConfig, RewardConfig, PPOConfig) for field in dataclasses.fields(cls)}
    assert MAY_CHANGE.keys() | MAY_NOT_CHANGE.keys() == fields
    assert not MAY_CHANGE.keys() & MAY_NOT_CHANGE.keys()


def test_differences() -> None:
    assert config_differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": [4]}) == {"b": (2, 3), "c": (None, [4])}


def test_what_goes_on_in_silence(old: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_resume(old, ppo())
        check_resume(old, ppo(save_steps=5, report_to=[], run_name="x", output_dir="elsewhere", reward_timeout=1.0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_steps": 500}, "max_steps: was null, is 500: warm-up and decay of the learning rate are spread"),
        ({"micro_batch_tokens": 64}, "micro_batch_tokens: was 4096, is 64: the run goes on, but sums round in another"),
        ({"eval_data": "e"}, "eval_data: was null, is 'e': evaluations before and after"),
    ],
)
def test_what_goes_on_with_a_warning(old: Path, values: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        check_resume(old, ppo(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"batch_size": 64},
            r"^batch_size: was 32, is 64: the checkpoint's place in the data would be another\. Resume",
        ),
        ({"seed": 1}, r"seed: was 0, is 1: the checkpoint's place in the data"),
        ({"train_data": ["d", "e"]}, r"train_data: was 'd', is \['d', 'e'\]"),
        (
            {"model_name_or_path": "n"},
            r"model_name_or_path: was 'm', is 'n': the checkpoint holds the weights of the old",
        ),
        ({"zero_stage": 2}, r"zero_stage: was 0, is 2: the checkpoint's optimizer state is laid out for the old one"),
        ({"learning_rate": 1.0}, r"learning_rate: was 1e-06, is 1\.0: the steps before and after would be of two diff"),
        ({"whiten_advantages": False}, r"whiten_advantages: was true, is false"),
        ({"reward": "b.py:f"}, r"reward: was 'a\.py:f', is 'b\.py:f'.* or start a new run in another output_dir"),
    ],
)
def test_what_is_refused(old: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_resume(old, ppo(**values, save_steps=3))


def test_all_refusals_at_once(old: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*- batch_size.*- gamma.*Resume with the values in .*config"):
        check_resume(old, ppo(gamma=0.5, batch_size=64))


def test_another_trainers_folder(old: Path) -> None:
    with pytest.raises(ConfigError, match=r"this run was made with a PPOConfig, it cannot go on with a SFTConfig"):
        check_resume(old, SFTConfig(model_name_or_path="m", train_data="d"))
    config: TrainerConfig = SFTConfig(model_name_or_path="m", train_data="d")
    save_config(config, old)
    with pytest.raises(ConfigError, match=r"made with a SFTConfig, it cannot go on with a RewardConfig"):
        check_resume(old, RewardConfig(model_name_or_path="m", train_data="d"))


def test_a_field_that_the_old_file_lacks_has_its_default(old: Path) -> None:
    text = old.read_text()
    old.write_text("".join(line for line in text.splitlines(keepends=True) if not line.startswith("gamma:")))
    check_resume(old, ppo())
    with pytest.raises(ConfigError, match=r"gamma: was 1\.0, is 0\.5"):
        check_resume(old, ppo(gamma=0.5))


def test_an_old_file_that_cannot_be_used(old: Path) -> None:
    old.write_text("gamma: high\n")
    with pytest.raises(
        ConfigError, match=r"(?s)cannot resume with the config that the run's folder holds: .*gamma: got"
    ):
        check_resume(old, ppo())
    old.unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml: no such file in /"):
        check_resume(old, ppo())
