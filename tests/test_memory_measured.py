"""The memory plan of --dry_run against the peak of real runs. Prints plan, measured and their ratio."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bench.generation.shapes import SHAPES

DEMO = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "vocab_size": 2048,
    "tie_word_embeddings": True,
}
SHORT = {"batch_size": 4, "max_prompt_length": 64, "max_new_tokens": 32}
LONG = {"batch_size": 16, "max_prompt_length": 64, "max_new_tokens": 64}

# name -> (command, shape of the model, settings, ranks)
RUNS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "SFT, 15M": ("sft", "15M", {"batch_size": 16, "max_length": 256, "max_steps": 8}, 1),
    "reward, 15M": ("reward", "15M", {"batch_size": 16, "max_length": 128, "max_steps": 8}, 1),
    "PPO, the demo's": (
        "ppo",
        "demo",
        {"batch_size": 64, "max_prompt_length": 128, "max_new_tokens": 24, "num_mini_batches": 2, "max_steps": 8},
        1,
    ),
    "PPO, 15M": ("ppo", "15M", LONG | {"max_steps": 8}, 1),
    "PPO, 110M": ("ppo", "110M", SHORT, 1),
    "PPO, 15M, shared trunk": ("ppo", "15M", LONG | {"value_model": "shared", "max_steps": 8}, 1),
    "PPO, 110M, bfloat16, checkpointing": (
        "ppo",
        "110M",
        SHORT | {"dtype": "bfloat16", "gradient_checkpointing": True},
        1,
    ),
    "PPO, 110M, ZeRO-2 on 2 ranks": ("ppo", "110M", SHORT | {"zero_stage": 2}, 2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of each shape with random weights, and rows as long as the runs take."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from bench.trainers.bench_ppo_step import save_tokenizer

    folder = tmp_path_factory.mktemp("memory")
    for name, shape in {"demo": DEMO, "15M": SHAPES["15M"], "110M": SHAPES["110M"]}.items():
        torch.manual_seed(0)
        config = LlamaConfig(**shape, bos_token_id=None, eos_token_id=1, pad_token_id=0)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        save_tokenizer(folder / name, int(shape["vocab_size"]))
    words = random.Random(0)

    def text(tokens: int) -> str:
        return " ".join(str(words.randrange(2, 2000)) for _ in range(tokens))

    (folder / "reward.py").write_text("def reward(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n")
    for name, rows in {
        "sft": [{"prompt": text(64), "completion": text(191)} for _ in range(32)],
        "reward": [{"prompt": text(64), "chosen": text(63), "rejected": text(63)} for _ in range(32)],
        "ppo-64": [{"prompt": text(64)} for _ in range(32)],
        "ppo-128": [{"prompt": text(128)} for _ in range(128)],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_plan_is_within_15_percent(name: str, folder: Path, tmp_path: Path) -> None:
    command, model, settings, ranks = RUNS[name]
    config: dict[str, Any] = {
        "model_name_or_path": str(folder / model),
        "train_data": str(folder / f"{command}.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "report_to": [],
        "max_steps": 3,
    }
    if command == "ppo":
        config["train_data"] = str(folder / f"ppo-{settings['max_prompt_length']}.jsonl")
        config |= {"reward": f"{folder / 'reward.py'}:reward", "min_new_tokens": settings["max_new_tokens"]}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config | settings))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launch, "-m", "bench.run_memory", command, str(file)],
        capture_output=True,
        text=True,
        timeout=1800,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == ranks
    plan, measured = found[0]["plan"], max(rank["measured"] for rank in found)
    print(f"\n| {name} | {plan / 1e9:.2f} | {measured / 1e9:.2f} | {plan / measured:.2f} |")
    assert plan == pytest.approx(measured, rel=0.15)
