"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from rlhf_fast.cli import main
from rlhf_fast.trainers import SFTTrainer
from tests.trainers.conftest import read_metrics, save_letters_model, write_jsonl


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of three tiny stages, each with its own file, as in recipes/demo."""
    folder = tmp_path_factory.mktemp("recipe")
    save_letters_model(folder / "base")
    (folder / "rewards.py").write_text(
        "def count_a(prompts, completions, **columns):\n    return [float(t.count('a')) for t in completions]\n"
    )
    common = {"batch_size": 8, "max_steps": 2, "report_to": [], "learning_rate": 1e-3}
    stages = {
        "sft": {
            "model_name_or_path": f"{folder}/base",
            "train_data": write_jsonl(folder / "sft.jsonl", [{"prompt": p, "completion": "ab"} for p in "xyc"]),
        },
        "reward": {
            "model_name_or_path": f"{folder}/old/sft/final",
            "train_data": write_jsonl(
                folder / "pairs.jsonl", [{"prompt": p, "chosen": "aa", "rejected": "bb"} for p in "xyc"]
            ),
        },
        "ppo": {
            "model_name_or_path": f"{folder}/old/sft/final",
            "value_model_path": f"{folder}/old/reward/final",
            "reward": [
                {"source": f"{folder}/old/reward/final", "weight": 1.0, "name": "model"},
                {"source": f"{folder}/rewards.py:count_a", "weight": 0.0},
            ],
            "train_data": write_jsonl(folder / "prompts.jsonl", [{"prompt": p} for p in "xyc"]),
            "eval_data": write_jsonl(folder / "eval.jsonl", [{"prompt": p} for p in "de"]),
            "max_new_tokens": 4,
        },
    }
    for stage, fields in stages.items():
        fields = {**fields, **common, "output_dir": f"{folder}/old/{stage}"}
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(fields))
    (folder / "pipeline.yaml").write_text("sft: sft.yaml\nreward: reward.yaml\nppo: ppo.yaml\n")
    return folder


@pytest.fixture(scope="module")
def runs(recipe: Path) -> Path:
    """The pipeline's three runs, in a folder that its configs do not name."""
    status = main(
        ["pipeline", "--config", f"{recipe}/pipeline.yaml", "--output_dir", f"{recipe}/new", "ppo.max_steps=3"]
    )
    assert status == 0
    return recipe / "new"


def test_pipeline_hands_each_stage_the_one_before(recipe: Path, runs: Path) -> None:
    assert not (recipe / "old").exists()
    config = yaml.safe_load((runs / "ppo" / "config.yaml").read_text())
    assert config["model_name_or_path"] == f"{runs}/sft/final"
    assert config["reward"][0]["source"] == f"{runs}/reward/final"
    rows = read_metrics(runs / "ppo")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {"rewards/model", "rewards/count_a", "eval/scores", "objective/kl"} <= set(rows[-1])
    assert rows[-1]["objective/scores"] == pytest.approx(rows[-1]["rewards/model"])  # weight 0 is only reported
    for stage in ("sft", "reward", "ppo"):
        assert (runs / stage / "report.html").stat().st_size > 1000


def test_a_resumed_pipeline_leaves_finished_stages_alone(
    recipe: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in runs.rglob("*")}
    arguments = ["pipeline", "--config", f"{recipe}/pipeline.yaml", "--output_dir", str(runs), "ppo.max_steps=3"]
    assert main([*arguments, "--resume"]) == 0
    assert capsys.readouterr().err.count("is finished; nothing is left to do") == 3
    assert {file: file.stat().st_mtime_ns for file in runs.rglob("*")} == before


def test_a_pipeline_is_planned_before_its_models_are_there(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", f"{recipe}/pipeline.yaml", "--output_dir", f"{recipe}/planned"]
    assert main(["pipeline", *config, "--dry_run"]) == 0
    plans = capsys.readouterr().out
    assert plans.count("all, on one rank") == 3
    assert "reward base" in plans  # in place of the reward model's final/
    assert not (recipe / "planned").exists()


def test_generate_prints_one_object_a_completion(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--model", f"{runs}/ppo/final", "--prompt", "x", "--prompt", "y", "n=2", "max_tokens=5"]
    assert main([*arguments, "seed=1"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["x", "x", "y", "y"]
    assert all(row["tokens"] <= 5 and row["logprob"] < 0 for row in rows)
    assert main([*arguments, "seed=1"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows


def test_generate_refuses_unknown_sampling_options(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", f"{runs}/ppo/final", "--prompt", "x", "temprature=1"]) == 2
    assert "temperature" in capsys.readouterr().err


def test_generate_says_what_is_wrong_with_a_prompt(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", f"{runs}/ppo/final", "--prompt", "x", "--prompt", "ab" * 32]) == 2
    assert capsys.readouterr().err == (
        "rlhf-fast generate: prompt 1 has 64 tokens; the model's context holds 64, which leaves no room for a "
        "completion. Shorten the prompt\n"
    )


def test_eval_scores_a_policy(recipe: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", "--config", f"{recipe}/ppo.yaml", f"reward={recipe}/rewards.py:count_a"]
    assert main([*arguments, "--model", f"{runs}/ppo/final"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert 0 <= metrics["scores"] <= 4
    assert set(metrics) >= {"scores_stderr", "mean_length", "distinct_2", "eos_rate"}
    assert main([*arguments, "--model", f"{runs}/ppo/last"]) == 2
    assert "no folder last" in capsys.readouterr().err
    assert main([*arguments, "--model", f"{runs}/ppo/final", "eval_data=nowhere.jsonl"]) == 2
    assert "eval_data: no file or folder nowhere.jsonl" in capsys.readouterr().err


def test_eval_refuses_a_tokenizer_of_another_model(
    recipe: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(runs / "ppo" / "final", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["z"])
    tokenizer.save_pretrained(folder)
    overrides = [f"reward={recipe}/rewards.py:count_a"]
    assert main(["eval", "--config", f"{recipe}/ppo.yaml", "--model", str(folder), *overrides]) == 1
    assert "token ids up to 10" in capsys.readouterr().err


def test_pipeline_override_needs_its_stage(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pipeline", "--config", f"{recipe}/pipeline.yaml", "max_steps=1"]) == 2
    assert "sft.max_steps=1" in capsys.readouterr().err


def test_overrides_may_stand_anywhere_and_the_launcher_adds_its_own(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = f"{recipe}/sft.yaml"
    assert main(["--local_rank=0", "sft", "max_steps=3", "--config", config, "bogus=1", "--dry_run"]) == 2
    assert "unknown key 'bogus'" in capsys.readouterr().err
    assert main(["sft", "max_steps=3", "--config", config, "batch_size=2", "--dry_run"]) == 0
    with pytest.raises(SystemExit):
        main(["sft", "--config", config, "--bogus=1", "--dry_run"])
    assert "unrecognized arguments: --bogus=1" in capsys.readouterr().err


def test_a_stopped_stage_ends_the_pipeline(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulate = SFTTrainer.accumulate

    def interrupted(trainer: SFTTrainer, rows: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return accumulate(trainer, rows)

    monkeypatch.setattr(SFTTrainer, "accumulate", interrupted)
    assert main(["pipeline", "--config", f"{recipe}/pipeline.yaml", "--output_dir", f"{recipe}/stopped"]) == 0
    assert (recipe / "stopped" / "sft" / "checkpoints" / "step-1").is_dir()
    assert not (recipe / "stopped" / "reward").exists()


def test_help_is_quick_and_lists_what_works() -> None:
    probe = "import sys, rlhf_fast.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    for command in ("sft", "reward", "ppo", "pipeline", "generate", "chat", "eval", "bench", "doctor", "build"):
        assert f"\n    {command} " in done.stdout
    assert "serve" not in done.stdout
