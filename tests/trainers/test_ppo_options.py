"""Options of PPO that the other tests leave alone, through the trainer."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast import PPOConfig, PPOTrainer
from rlhf_fast.distributed import World
from rlhf_fast.errors import ConfigError
from rlhf_fast.trainers.batching import check_ranks

from .conftest import COUNT_A, ppo_settings, read_metrics, write_jsonl


def count(letter: str, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(text.count(letter)) for text in completions]


def make_trainer(model: Path, folder: Path, *, resume: bool = False, **options: Any) -> PPOTrainer:
    """Its reward is a partial, which has no name of its own."""
    config = PPOConfig(**ppo_settings(model, folder, **({"max_steps": 1} | options)))
    return PPOTrainer(config, reward=functools.partial(count, "a"), resume=resume)


def test_rollout_backend_chooses_what_decodes(letters_model: Path, tmp_path: Path) -> None:
    drawn = {}
    for name in ("auto", "cpp", "transformers"):
        (tmp_path / name).mkdir()
        trainer = make_trainer(letters_model, tmp_path / name, rollout_backend=name)
        drawn[name] = trainer.rollout(trainer.next_prompts(), 1).tokens
        assert trainer.generator.stats.backend == name.replace("auto", "cpp")
    assert torch.equal(drawn["cpp"], drawn["auto"])
    assert torch.equal(drawn["cpp"], drawn["transformers"])


@pytest.mark.parametrize("on", [False, True])
def test_gradient_checkpointing_recomputes_layers(on: bool, letters_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(letters_model, tmp_path, gradient_checkpointing=on, learning_rate=0.0)
    trainer.rollout(trainer.next_prompts(), 1)
    assert trainer.generator.stats.backend == "cpp"  # it refuses hooked models: no hook is left behind
    calls = []
    assert trainer.models.critic_module is not None
    for model in (trainer.models.causal_lm, trainer.models.critic_module.model):
        model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer.train()
    assert sum(calls) == (4 if on else 2)  # of two models, one micro-batch


def test_activations_of_one_model_are_alive_at_a_time(letters_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(letters_model, tmp_path, micro_batch_tokens=16)
    policy, critic = trainer.models.causal_lm, trainer.models.critic_module
    activations: list[weakref.ref[torch.Tensor]] = []
    alive = []

    def keep(module: Any, inputs: tuple[torch.Tensor]) -> None:
        if torch.is_grad_enabled():
            activations.append(weakref.ref(inputs[0]))  # which the weight's gradient needs

    def starts(*_: Any) -> None:
        if torch.is_grad_enabled():
            alive.append(sum(activation() is not None for activation in activations))

    for layer in policy.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(keep)
    assert critic is not None
    critic.register_forward_pre_hook(starts)
    trainer.train()
    assert len(activations) >= 2 * len(alive) > 2
    assert not any(alive)


def test_every_metric_is_in_the_docs(letters_model: Path, tmp_path: Path) -> None:
    options = {"num_ppo_epochs": 2, "target_kl": 1e-9, "save_steps": 1, "learning_rate": 1e-3, "max_steps": 2}
    held_out = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "x"}])
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "ab"}])
    make_trainer(letters_model, tmp_path, eval_data=held_out, unsup_coef=1.0, unsup_data=texts, **options).train()
    docs = (Path(__file__).parents[2] / "docs" / "ppo.md").read_text(encoding="utf-8")
    names = {name for row in read_metrics(tmp_path / "run") for name in row}
    assert {"policy/stopped_early", "eval_before/scores", "time/save"} <= names
    for name in names:
        written = re.sub(r"rewards/.*", "rewards/NAME", name.replace("eval_before/", "eval/"))
        assert f"`{written}`" in docs, name


def test_non_score_reward_is_the_kl_term_alone(letters_model: Path, tmp_path: Path) -> None:
    options = {"missing_eos_penalty": 3.0, "clip_score": 0.5, "whiten_rewards": True, "kl_coef": 0.1}
    make_trainer(letters_model, tmp_path, max_steps=2, learning_rate=1e-2, **options).train()
    row = read_metrics(tmp_path / "run")[-1]
    assert abs(row["objective/kl"]) > 1e-4
    assert row["objective/non_score_reward"] == pytest.approx(-0.1 * row["objective/kl"], rel=1e-3)


def test_resume_without_a_checkpoint_overwrites_nothing(letters_model: Path, tmp_path: Path) -> None:
    make_trainer(letters_model, tmp_path).train()
    before = read_metrics(tmp_path / "run")
    make_trainer(letters_model, tmp_path, resume=True).train()
    assert read_metrics(tmp_path / "run.1") == before
    assert (tmp_path / "run.1" / "final").is_dir()


@pytest.mark.parametrize(
    ("options", "field"), [({"batch_size": 6}, "batch_size"), ({"batch_size": 8, "num_mini_batches": 4}, "num_mini")]
)
def test_batches_that_do_not_divide_among_ranks_are_refused(options: dict[str, int], field: str) -> None:
    config = PPOConfig(model_name_or_path="m", train_data="d", **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"^{field}"):
        check_ranks(config, World(rank=0, world_size=4, local_rank=0, device=torch.device("cpu")))


@pytest.mark.parametrize(
    "options",
    [{"whiten_rewards": True, "normalize_scores": True}, {"semantics": "dschat", "whiten_advantages": False}],
    ids=str,
)
def test_reference_ops_need_no_compiler(options: dict[str, Any], letters_model: Path, tmp_path: Path) -> None:
    """Nothing is built, in a process that has nothing built: what the message of a missing compiler promises."""
    config = ppo_settings(letters_model, tmp_path, reward=COUNT_A, ops_backend="reference", max_steps=1, **options)
    (tmp_path / "ppo.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "rlhf_fast.cli", "ppo", "--config", str(tmp_path / "ppo.yaml")]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "run")],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "CXX": "no-such-compiler", "RLHF_FAST_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(read_metrics(tmp_path / "run")) == 1
    assert "transformers decodes instead of C++" in done.stderr
