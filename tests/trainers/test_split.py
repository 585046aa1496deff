"""A run does not depend on how it is split: over ranks, micro-batches and ZeRO stages the same weights come out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from .conftest import LETTERS, ppo_settings, read_metrics, write_jsonl

ROOT = Path(__file__).parents[2]
STAGES = [0, 1, 2, 3]


def run_on(ranks: int, folder: Path, stages: list[int], config: dict[str, Any]) -> None:
    folder.mkdir()
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    launch = [sys.executable, *(torchrun if ranks > 1 else []), "-m", "tests.trainers.split_ranks"]
    started_by_a_launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    done = subprocess.run(
        [*launch, str(file), str(folder), *map(str, stages)],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in started_by_a_launcher} | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]


def settings(model: Path, folder: Path, max_steps: int) -> dict[str, Any]:
    return ppo_settings(
        model,
        folder,
        prompts=[a + b for a in LETTERS for b in "abcd"],
        reward="",
        micro_batch_tokens=12,
        num_ppo_epochs=2,
        learning_rate=1e-3,
        max_grad_norm=0.5,  # below the gradient's norm: it is clipped as one
        whiten_rewards=True,
        kl_target=0.5,
        max_steps=max_steps,
        save_steps=max_steps,
    )


def assert_same_run(first: Path, second: Path, stage: int, of: int) -> None:
    """Metrics of every step, the weights at the end, and each prompt once."""
    mine, theirs = (read_metrics(folder / f"stage-{s}") for folder, s in ((second, stage), (first, of)))
    names = ["objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "grad_norm", "value/grad_norm"]
    names += ["policy/entropy_avg", "policy/approxkl_avg", "num_tokens", "objective/kl_coef"]
    names += ["loss/ptx_avg"] if "loss/ptx_avg" in theirs[0] else []
    for a, b in zip(theirs, mine, strict=True):
        for name in names:
            tolerance = 1e-5 if a["step"] == 1 else 1e-4
            assert b[name] == pytest.approx(a[name], rel=tolerance, abs=tolerance), (b["step"], name)
    mine, theirs = (
        torch.load(folder / f"stage-{s}.pt", weights_only=True) for folder, s in ((second, stage), (first, of))
    )
    for a, b in zip(theirs["weights"], mine["weights"], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    assert mine["prompts"] == theirs["prompts"]  # each one once: no two ranks had the same


def assert_same_average(first: Path, second: Path, stage: int, of: int) -> None:
    """final_ema/ of both, which is neither the weights at the end nor those at the beginning."""
    mine, theirs = (
        AutoModelForCausalLM.from_pretrained(f / "final_ema")
        for f in (second / f"stage-{stage}", first / f"stage-{of}")
    )
    final = AutoModelForCausalLM.from_pretrained(second / f"stage-{stage}" / "final").state_dict()
    expected = theirs.state_dict()
    for name, tensor in mine.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    assert (mine.lm_head.weight - final["lm_head.weight"]).abs().max() > 1e-4


def optimizer_bytes(folder: Path, stage: int) -> list[int]:
    """Sizes of the policy's optimiser files in the checkpoint, one a rank that keeps a part."""
    (checkpoint,) = (folder / f"stage-{stage}" / "checkpoints").glob("step-*")
    return [file.stat().st_size for file in sorted(checkpoint.glob("policy/**/*optim_states.pt"))]


def test_one_rank_and_two_are_the_same_run(letters_model: Path, tmp_path: Path) -> None:
    config = settings(letters_model, tmp_path, max_steps=2) | {
        "value_zero_stage": 1,
        "ref_zero_stage": 3,
        "enable_ema": True,
        "unsup_coef": 2.0,
        "unsup_data": write_jsonl(tmp_path / "texts.jsonl", [{"text": "ab" * n + "xy"} for n in (1, 9, 3, 6, 2)]),
    }
    run_on(1, tmp_path / "one", [1], config)
    run_on(2, tmp_path / "two", [2, 3], config)
    # As many micro-batches on both ranks, none empty while there are rows to share out.
    assert json.loads((tmp_path / "two" / "micro_batches.json").read_text()) == [
        [[[0], [2], [1, 3], [4]], [[0], [2], [1, 3], [4]]],
        [[[0], [1], [], []], [[0], [1], [], []]],
    ]
    whole = optimizer_bytes(tmp_path / "one", 1)
    assert len(whole) == 1
    for stage in (2, 3):
        assert_same_run(tmp_path / "one", tmp_path / "two", stage, of=1)
        assert_same_average(tmp_path / "one", tmp_path / "two", stage, of=1)
        parts = optimizer_bytes(tmp_path / "two", stage)
        assert len(parts) == 2
        assert all(part < 0.75 * whole[0] for part in parts)  # a half, and what the file itself takes


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_and_any_stage_is_the_same_run(ranks: int, letters_model: Path, tmp_path: Path) -> None:
    config = settings(letters_model, tmp_path, max_steps=10)
    run_on(1, tmp_path / "one", STAGES, config)
    run_on(ranks, tmp_path / "many", STAGES, config)
    for stage in STAGES:
        assert_same_run(tmp_path / "one", tmp_path / "one", stage, of=0)
        assert_same_run(tmp_path / "one", tmp_path / "many", stage, of=0)
