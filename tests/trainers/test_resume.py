"""A run that is killed or stopped goes on from its last checkpoint as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from .conftest import COUNT_A, LETTERS, ppo_settings, read_metrics, repeatable_metrics, write_jsonl

STEPS = 7


@pytest.fixture(scope="module")
def config_file(letters_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PPO config that uses all that has state: two engines, averaged weights, adaptive KL, two data sets."""
    folder = tmp_path_factory.mktemp("resume")
    config = ppo_settings(
        letters_model,
        folder,
        prompts=LETTERS * 3,
        eval_data=write_jsonl(folder / "eval.jsonl", [{"prompt": p} for p in "xy"]),
        reward=COUNT_A,
        batch_size=16,
        num_ppo_epochs=2,
        num_mini_batches=2,
        micro_batch_tokens=64,
        kl_target=1.0,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        max_steps=STEPS,
        save_steps=2,
        eval_steps=3,
        enable_ema=True,
        unsup_coef=0.5,
        unsup_data=write_jsonl(folder / "texts.jsonl", [{"text": "ab" * n} for n in range(1, 12)]),
    )
    (folder / "ppo.yaml").write_text(yaml.safe_dump(config))
    return folder / "ppo.yaml"


def start(config_file: Path, output_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rlhf_fast.cli", "ppo", "--config", str(config_file)]
    return subprocess.Popen(
        [*command, "--output_dir", str(output_dir), *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for_rows(process: subprocess.Popen[str], output_dir: Path, count: int) -> None:
    """Return as soon as metrics.jsonl has `count` rows."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        file = output_dir / "metrics.jsonl"
        if file.exists() and file.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.005)
    raise AssertionError(f"no {count} rows: {process.communicate()[1]}")


def finish(process: subprocess.Popen[str]) -> str:
    errors = process.communicate(timeout=180)[1]
    assert process.returncode == 0, errors
    return errors


@pytest.fixture(scope="module")
def uninterrupted(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    finish(start(config_file, output_dir))
    return output_dir


def assert_same_run(output_dir: Path, uninterrupted: Path) -> None:
    rows, expected = repeatable_metrics(output_dir), repeatable_metrics(uninterrupted)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows == expected
    for final in ("final", "final_ema"):
        ours, theirs = (load_file(folder / final / "model.safetensors") for folder in (output_dir, uninterrupted))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    samples = [(folder / "samples.jsonl").read_text() for folder in (output_dir, uninterrupted)]
    assert samples[0] == samples[1]


def test_killed_run_resumes_bit_for_bit(config_file: Path, uninterrupted: Path, tmp_path: Path) -> None:
    output_dir = tmp_path / "run"
    process = start(config_file, output_dir)
    wait_for_rows(process, output_dir, 5)
    process.kill()
    process.communicate()
    assert not (output_dir / "final").exists()
    saved = sorted(int(folder.name.removeprefix("step-")) for folder in (output_dir / "checkpoints").glob("step-*"))
    rows_before = (output_dir / "metrics.jsonl").read_text().splitlines()[: saved[-1]]

    finish(start(config_file, output_dir, "--resume"))
    assert saved[-1] >= 4
    # Rows up to the checkpoint are those of the first process, to the second on its clock: they were not run again.
    assert (output_dir / "metrics.jsonl").read_text().splitlines()[: saved[-1]] == rows_before
    assert_same_run(output_dir, uninterrupted)


def test_sigterm_finishes_the_step_saves_and_exits_well(config_file: Path, uninterrupted: Path, tmp_path: Path) -> None:
    output_dir = tmp_path / "run"
    process = start(config_file, output_dir)
    wait_for_rows(process, output_dir, 1)
    process.send_signal(signal.SIGTERM)
    errors = finish(process)
    last = read_metrics(output_dir)[-1]["step"]
    assert f"stopped after step {last}" in errors
    assert (output_dir / "checkpoints" / f"step-{last}").is_dir()
    finish(start(config_file, output_dir, "--resume"))
    assert_same_run(output_dir, uninterrupted)


def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    config_file: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    output_dir = tmp_path / "run"
    process = start(config_file, output_dir)
    wait_for_rows(process, output_dir, 5)
    process.kill()
    process.communicate()
    newest = max((output_dir / "checkpoints").glob("step-*"), key=lambda folder: int(folder.name[5:]))
    victim = next(file for file in sorted(newest.rglob("*")) if file.suffix == ".pt" and file.stat().st_size > 1000)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    errors = finish(start(config_file, output_dir, "--resume"))
    assert newest.name in errors
    assert victim.name in errors
    assert_same_run(output_dir, uninterrupted)


def test_a_new_run_in_the_same_folder_moves_the_old_one_aside(config_file: Path, tmp_path: Path) -> None:
    output_dir = tmp_path / "run"
    finish(start(config_file, output_dir, "max_steps=1"))
    errors = finish(start(config_file, output_dir, "max_steps=1", "seed=5"))
    assert "held a run" in errors
    assert yaml.safe_load((output_dir / "config.yaml").read_text())["seed"] == 5
    assert yaml.safe_load((tmp_path / "run.1" / "config.yaml").read_text())["seed"] == 0
    assert json.loads((tmp_path / "run.1" / "final" / "config.json").read_text())["model_type"] == "llama"
