"""Values that cannot work, alone or together; and files that are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.config import PPOConfig, RewardConfig, SFTConfig, TrainerConfig
from rlhf_fast.config_loading import check_config, check_paths
from rlhf_fast.errors import ConfigError


def make(cls: type[TrainerConfig], **values: Any) -> TrainerConfig:
    needed: dict[str, Any] = {"model_name_or_path": "m", "train_data": "d.jsonl"}
    if cls is PPOConfig:
        needed["reward"] = "judge.py:score"
    return cls(**needed | values)


@pytest.mark.parametrize("cls", [SFTConfig, RewardConfig, PPOConfig])
def test_the_defaults_are_good(cls: type[TrainerConfig]) -> None:
    check_config(make(cls))


DSCHAT = {"semantics": "dschat", "whiten_advantages": False}


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (SFTConfig, {"max_steps": 1, "num_train_epochs": 0}),
        (SFTConfig, {"learning_rate": 0.0}),
        (SFTConfig, {"dtype": "bfloat16", "zero_stage": 1, "offload_optimizer": True}),
        (SFTConfig, {"eval_steps": 5, "eval_data": "e.jsonl"}),
        (PPOConfig, {"dtype": "float16", "zero_stage": 3}),
        (PPOConfig, {"batch_size": 32, "num_generations": 8, "num_mini_batches": 4}),
        (PPOConfig, {"gamma": 0.0, "lam": 1.0, "cliprange": 5.0, "cliprange_high": 0.0, "dual_clip": 3.0}),
        (PPOConfig, {"kl_in": "loss", "kl_estimator": "k3"}),
        (PPOConfig, {"kl_coef": 0.0, "ref_model_path": "m"}),
        (PPOConfig, {"value_model": "shared"}),
        (PPOConfig, {"reward": [{"source": "a.py:f", "weight": 0}, {"source": "http://h/x"}]}),
        (PPOConfig, {"reward_timeout": 0.0, "top_p": 1.0, "min_new_tokens": 128}),
        (PPOConfig, {"unsup_coef": 27.8, "unsup_data": ["t.jsonl"], "enable_ema": True, "ema_decay": 0.0}),
        (PPOConfig, DSCHAT),
        (PPOConfig, {**DSCHAT, "kl_estimator": "k1", "kl_coef": 0.1, "clip_score": 5.0, "num_ppo_epochs": 2}),
    ],
)
def test_what_is_allowed(cls: type[TrainerConfig], values: dict[str, Any]) -> None:
    check_config(make(cls, **values))


MISTAKES: list[tuple[type[TrainerConfig], dict[str, Any], str]] = [
    (SFTConfig, {"batch_size": 0}, r"^batch_size: must be at least 1, got 0\.$"),
    (SFTConfig, {"batch_size": -1}, r"batch_size: must be at least 1, got -1"),
    (SFTConfig, {"max_length": 0}, r"max_length: must be at least 1"),
    (SFTConfig, {"micro_batch_tokens": 0}, r"micro_batch_tokens: must be at least 1"),
    (SFTConfig, {"learning_rate": -1e-5}, r"learning_rate: must be at least 0, got -1e-05"),
    (SFTConfig, {"warmup_ratio": 3.0}, r"warmup_ratio: must be at least 0 and at most 1, got 3\.0"),
    (SFTConfig, {"weight_decay": -0.1}, r"weight_decay: must be at least 0"),
    (SFTConfig, {"lora_r": 0}, r"lora_r: must be at least 1"),
    (SFTConfig, {"lora_alpha": 0}, r"lora_alpha: must be at least 1"),
    (SFTConfig, {"lora_dropout": 0.1}, r"lora_dropout: must be 0, got 0\.1: dropout is off everywhere"),
    (SFTConfig, {"lora_target_modules": []}, r"lora_target_modules: is empty"),
    (SFTConfig, {"adam_beta2": 1.0}, r"adam_beta2: must be at least 0 and less than 1"),
    (SFTConfig, {"adam_epsilon": 0.0}, r"adam_epsilon: must be more than 0"),
    (SFTConfig, {"max_grad_norm": -1.0}, r"max_grad_norm: must be at least 0"),
    (SFTConfig, {"max_steps": -1}, r"max_steps: must be at least 1, got -1 \(null: num_train_epochs decides\)"),
    (SFTConfig, {"num_train_epochs": 0.0}, r"num_train_epochs: must be more than 0 unless max_steps is set, got 0\.0"),
    (SFTConfig, {"save_steps": 0}, r"save_steps: must be at least 1, got 0 \(null: no checkpoints\)"),
    (SFTConfig, {"eval_steps": 0, "eval_data": "e"}, r"eval_steps: must be at least 1, got 0 \(null: before and after"),
    (SFTConfig, {"eval_steps": 5}, r"eval_steps: there is nothing to evaluate: set eval_data, or eval_steps: null"),
    (SFTConfig, {"save_total_limit": 0}, r"save_total_limit: must be at least 1"),
    (SFTConfig, {"seed": -1}, r"seed: must be at least 0 and less than 4294967296, got -1"),
    (SFTConfig, {"model_name_or_path": " "}, r"model_name_or_path: must not be empty"),
    (SFTConfig, {"train_data": []}, r"train_data: must not be empty, got \[\]"),
    (SFTConfig, {"offload_optimizer": True}, r"offload_optimizer: .* set zero_stage to 1, 2 or 3"),
    (SFTConfig, {"offload_param": True, "zero_stage": 2}, r"offload_param: .* set zero_stage to 3"),
    (
        SFTConfig,
        {"nvme_path": "/disk", "zero_stage": 3},
        r"nvme_path: nothing goes there: set offload_optimizer or offload_param",
    ),
    (PPOConfig, {"value_model": "shared", "value_zero_stage": 1}, r"value_zero_stage: a shared value head has no"),
    (
        PPOConfig,
        {"zero_stage": 3, "offload_param": True, "nvme_path": "/disk", "value_zero_stage": 2},
        r"value_zero_stage: offload_param needs at least 3 for the value model too",
    ),
    (PPOConfig, {"ema_decay": 1.5}, r"ema_decay: must be at least 0 and at most 1, got 1\.5"),
    (PPOConfig, {"unsup_coef": -1.0, "unsup_data": "t.jsonl"}, r"unsup_coef: must be at least 0"),
    (PPOConfig, {"unsup_coef": 2.0}, r"^unsup_data: is needed beside unsup_coef: 2\.0, or leave both out"),
    (PPOConfig, {"unsup_data": "t.jsonl"}, r"^unsup_coef: is needed beside unsup_data: 't\.jsonl'"),
    (PPOConfig, {**DSCHAT, "unsup_coef": 2.0, "unsup_data": "t.jsonl"}, r"unsup_coef: .*a step of its own"),
    (RewardConfig, {"center_rewards_coefficient": -1.0}, r"center_rewards_coefficient: must be at least 0"),
    (PPOConfig, {"reward": ""}, r"^reward: is missing: write \"file\.py:function\""),
    (PPOConfig, {"reward": []}, r"^reward: is missing"),
    (
        PPOConfig,
        {"reward": [{"sourse": "a.py:f"}]},
        r"reward: reward\[0\]: unknown key 'sourse'; did you mean 'source'",
    ),
    (PPOConfig, {"reward": [{"source": "a.py:f"}, {"source": "b.py:f"}]}, r"two sources are called 'f'"),
    (PPOConfig, {"reward_timeout": -1.0}, r"reward_timeout: must be at least 0"),
    (PPOConfig, {"temperature": 0.0}, r"temperature: must be more than 0, got 0\.0 \(greedy sampling, 0, explores not"),
    (PPOConfig, {"top_p": 0.0}, r"top_p: must be more than 0 and at most 1"),
    (PPOConfig, {"top_p": 1.1}, r"top_p: must be more than 0 and at most 1"),
    (PPOConfig, {"min_p": 1.0}, r"min_p: must be at least 0 and less than 1"),
    (PPOConfig, {"top_k": -1}, r"top_k: must be at least 0"),
    (
        PPOConfig,
        {"repetition_penalty": 1.2},
        r"repetition_penalty: must be 1 in PPO, got 1\.2: sampled tokens would not",
    ),
    (PPOConfig, {"gamma": 1.01}, r"gamma: must be at least 0 and at most 1, got 1\.01"),
    (PPOConfig, {"lam": -0.1}, r"lam: must be at least 0 and at most 1"),
    (PPOConfig, {"cliprange": 0.0}, r"cliprange: must be more than 0"),
    (PPOConfig, {"cliprange_high": -0.1}, r"cliprange_high: must be at least 0"),
    (PPOConfig, {"dual_clip": 1.0}, r"dual_clip: must be more than 1, got 1\.0"),
    (PPOConfig, {"cliprange_value": 0.0}, r"cliprange_value: must be more than 0, got 0\.0 \(null: no clipping\)"),
    (PPOConfig, {"clip_score": 0.0}, r"clip_score: must be more than 0, got 0\.0 \(null: no clipping\)"),
    (PPOConfig, {"kl_coef": -0.1}, r"kl_coef: must be at least 0"),
    (PPOConfig, {"kl_in": "loss", "kl_estimator": "k1"}, r"kl_estimator: k1 in the loss has a gradient of zero"),
    (PPOConfig, {"kl_coef": 0.0, "kl_target": 6.0}, r"kl_target: needs kl_coef above 0"),
    (
        PPOConfig,
        {"batch_size": 30, "num_generations": 4},
        r"batch_size: counts completions: .*num_generations \(4\), got 30",
    ),
    (PPOConfig, {"num_mini_batches": 5}, r"batch_size: must be a multiple of num_mini_batches \(5\), got 32"),
    (PPOConfig, {"num_mini_batches": 0}, r"^num_mini_batches: must be at least 1, got 0\.$"),
    (PPOConfig, {"num_generations": 0}, r"^num_generations: must be at least 1, got 0\.$"),
    (PPOConfig, {"num_ppo_epochs": 0}, r"num_ppo_epochs: must be at least 1"),
    (PPOConfig, {"max_new_tokens": 0}, r"max_new_tokens: must be at least 1"),
    (PPOConfig, {"min_new_tokens": 129}, r"min_new_tokens: must be at most max_new_tokens \(128\), got 129"),
    (PPOConfig, {"stop_token_ids": [3, -1]}, r"stop_token_ids: token ids are at least 0, got \[3, -1\]"),
    (PPOConfig, {"batch_size": 1, "normalize_scores": True}, r"normalize_scores: one completion has no deviation"),
    (
        PPOConfig,
        {"value_model": "shared", "value_model_path": "v"},
        r"value_model_path: a shared value head has no model",
    ),
    (PPOConfig, {"value_model": "shared", "value_learning_rate": 1.0}, r"value_learning_rate: a shared value head"),
    (
        PPOConfig,
        {"semantics": "dschat"},
        r"whiten_advantages: .*dschat has no such thing; set whiten_advantages: false",
    ),
    (PPOConfig, {**DSCHAT, "kl_in": "loss"}, r"^kl_in: semantics: dschat .* set kl_in: reward, got 'loss'"),
    (PPOConfig, {**DSCHAT, "kl_estimator": "k3"}, r"kl_estimator: semantics: dschat .* set kl_estimator: null"),
    (PPOConfig, {**DSCHAT, "dual_clip": 3.0}, r"dual_clip: semantics: dschat .* set dual_clip: null, got 3\.0"),
    (PPOConfig, {**DSCHAT, "entropy_coef": 0.1}, r"entropy_coef: semantics: dschat .* set entropy_coef: 0, got 0\.1"),
    (PPOConfig, {**DSCHAT, "value_model": "shared"}, r"value_model: semantics: dschat .* set value_model: separate"),
]


@pytest.mark.parametrize(("cls", "values", "message"), MISTAKES)
def test_what_is_refused(cls: type[TrainerConfig], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(make(cls, **values))


def test_all_broken_rules_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(make(PPOConfig, gamma=2.0, batch_size=0, reward=""))
    assert [line[: line.index(":")] for line in str(caught.value).splitlines()] == [
        "3 problems",
        "  - batch_size",
        "  - gamma",
        "  - reward",
    ]


def test_a_biased_estimator_in_the_reward_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="kl_estimator: k2 in the reward is a biased pull"):
        check_config(make(PPOConfig, kl_estimator="k2"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    for name in ("data/train.jsonl", "data/eval.jsonl", "judge.py", "template.jinja"):
        (tmp_path / name).touch()
    return tmp_path


GOOD = {
    "model_name_or_path": "models/tiny",
    "train_data": ["data/train.jsonl"],
    "eval_data": "data/eval.jsonl",
    "chat_template": "template.jinja",
    "reward": [
        {"source": "judge.py:f"},
        {"source": "models/tiny"},
        {"source": "http://host/x"},
        {"source": "json:loads"},
    ],
    "value_model_path": "models/tiny",
    "output_dir": "runs/new",
}


def test_paths_that_are_there(folder: Path) -> None:
    check_paths(make(PPOConfig, **GOOD))
    check_paths(make(PPOConfig, **GOOD | {"chat_template": "{{ messages[0].content }}"}))
    check_paths(make(PPOConfig, **GOOD | {"chat_template": "default"}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model_name_or_path": "models/tny"},
            r"^model_name_or_path: no folder tny in /.*/models\. Did you mean models/tiny\?",
        ),
        ({"model_name_or_path": "org/model"}, r"model_name_or_path: no folder org/model \(looked in /.*\)"),
        ({"model_name_or_path": "judge.py"}, r"model_name_or_path: no folder judge\.py in /"),
        ({"train_data": ["data/train.jsonl", "data/trian.jsonl"]}, r"train_data: .*Did you mean data/train\.jsonl\?"),
        ({"eval_data": "evl.jsonl"}, r"eval_data: no file or folder evl\.jsonl in /"),
        ({"chat_template": "templat.jinja"}, r"chat_template: no file .*Did you mean template\.jinja\?"),
        ({"ref_model_path": "models/x"}, r"ref_model_path: no folder x"),
        ({"value_model_path": "models/x"}, r"value_model_path: no folder x"),
        ({"reward": "juge.py:f"}, r"reward: no file or folder juge\.py in /.*Did you mean judge\.py\?"),
        ({"reward": "models/x"}, r"reward: no folder x in /"),
        ({"output_dir": "judge.py"}, r"output_dir: judge\.py is a file; a folder was expected"),
    ],
)
def test_paths_that_are_not(folder: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_paths(make(PPOConfig, **GOOD | values))
