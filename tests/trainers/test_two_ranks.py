"""The same commands under torchrun: two ranks train what one rank would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from .conftest import COUNT_A, ppo_settings, read_metrics, repeatable_metrics, write_jsonl


def run_on(ranks: int, command: str, config: dict[str, object], output_dir: Path) -> list[dict[str, float]]:
    file = output_dir.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config | {"output_dir": str(output_dir), "report_to": []}))
    launch = [sys.executable, "-m", "rlhf_fast.cli"]
    if ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        launch = [sys.executable, *torchrun, *launch[1:]]
    done = subprocess.run(
        [*launch, command, "--config", str(file)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    AutoModelForCausalLM.from_pretrained(output_dir / "final")
    return read_metrics(output_dir)


def test_sft_on_two_ranks_equals_one(letters_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": a * n, "completion": b * m} for a in "abc" for b in "xy" for n in (1, 3) for m in (1, 5, 9)]
    config = {
        "model_name_or_path": str(letters_model),
        "train_data": write_jsonl(tmp_path / "train.jsonl", rows),
        "eval_data": write_jsonl(tmp_path / "eval.jsonl", rows[::5]),
        "batch_size": 8,
        "micro_batch_tokens": 32,
        "learning_rate": 1e-2,
        "max_steps": 5,
        "zero_stage": 2,
    }
    one = run_on(1, "sft", config | {"zero_stage": 0}, tmp_path / "one")
    two = run_on(2, "sft", config, tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "grad_norm", "num_tokens", "lr", "epoch"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), (a["step"], name)
    assert one[-1]["eval/loss"] == pytest.approx(two[-1]["eval/loss"], rel=1e-5)


def test_ppo_with_nothing_to_evaluate_on_one_rank(letters_model: Path, tmp_path: Path) -> None:
    config = ppo_settings(
        letters_model,
        tmp_path,
        eval_data=write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "x"}]),
        reward=COUNT_A,
        batch_size=16,
        num_generations=2,
        num_mini_batches=2,
        micro_batch_tokens=16,
        learning_rate=5e-3,
        max_steps=3,
        zero_stage=3,
        gradient_checkpointing=True,
    )
    rows = run_on(2, "ppo", config, tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["rollout/logprob_drift_max"] < 1e-4 for row in rows)
    assert rows[0]["policy/clipfrac_avg"] < 0.5


def test_a_reward_model_that_is_split_gives_the_same_scores(
    letters_model: Path, reward_model: Path, tmp_path: Path
) -> None:
    reward = [{"source": COUNT_A, "weight": 0.5}, {"source": str(reward_model), "name": "judge"}]
    config = ppo_settings(letters_model, tmp_path, reward=reward, eval_data=str(tmp_path / "eval.jsonl"), max_steps=2)
    write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "x"}])  # one rank has nothing to score in an evaluation
    run_on(2, "ppo", config, tmp_path / "whole")
    run_on(2, "ppo", config | {"reward_zero_stage": 3}, tmp_path / "split")
    whole, split = (repeatable_metrics(tmp_path / name) for name in ("whole", "split"))
    assert "rewards/judge" in whole[0]
    for mine, theirs in zip(split, whole, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)


FAILS_ON_ONE_RANK = """
import os
calls = 0
def reward(prompts, completions, **columns):
    global calls
    calls += 1
    bad = calls == 2 and os.environ["RANK"] == "1"
    return [float("nan") if bad else float(len(text)) for text in completions]
"""


def test_a_reward_that_fails_on_one_rank_costs_the_batch_of_both(letters_model: Path, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(FAILS_ON_ONE_RANK)
    reward = f"{tmp_path / 'reward.py'}:reward"
    config = ppo_settings(letters_model, tmp_path, reward=reward, on_bad_reward="skip", max_steps=3)
    rows = run_on(2, "ppo", config, tmp_path / "run")
    assert [row["nonfinite_steps"] for row in rows] == [0, 1, 1]
    assert ["loss/policy_avg" in row for row in rows] == [True, False, True]
