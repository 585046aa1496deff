"""Peak memory of the PPO step beside TRL 1.12's at the same work: one model, reward model, prompts, lengths and batch.

    python -m bench.trainers.memory_trl [--shape 15M]      (after `make bench-trl`)

Each side is a process of its own; steps are few, as the peak comes early. Prints a table: the whole process, and less
what it had after its imports. Policy, reference, value and reward model are four of one shape, all in float32; the
whole batch is one micro-batch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from bench.generation.shapes import SHAPES
from bench.trainers.bench_ppo_step import save_tokenizer

ROOT = Path(__file__).parents[2]
PEER = ROOT / ".venv-trl/bin/python"  # of an environment with TRL
ROWS, PROMPT, NEW, STEPS = 16, 64, 64, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="15M")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, args.shape)
        ours = run([sys.executable, "-m", "bench.run_memory", "ppo", str(folder / "ppo.yaml")])
        theirs = run([str(PEER), "-m", "bench.trainers.trl_peer", str(folder), *map(str, (ROWS, NEW, STEPS))])
    print(f"| {args.shape} | ours, GB | TRL, GB | ours / TRL |\n|---|---|---|---|")
    for what, parts in {"whole process": ("baseline", "measured"), "less its imports": ("measured",)}.items():
        a, b = (sum(side[part] for part in parts) for side in (ours, theirs))
        print(f"| {what} | {a / 1e9:.2f} | {b / 1e9:.2f} | {a / b:.2f} |")


def write_inputs(folder: Path, shape: str) -> None:
    """Models with random weights, a tokenizer, prompts of PROMPT tokens, our config."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], bos_token_id=None, eos_token_id=1, pad_token_id=0, num_labels=1)
    for name, model in {"model": LlamaForCausalLM, "reward": LlamaForSequenceClassification}.items():
        model(config).save_pretrained(folder / name)
        save_tokenizer(folder / name, config.vocab_size)
    prompts = torch.randint(802, config.vocab_size, (STEPS * ROWS, PROMPT)).tolist()
    rows = [json.dumps({"prompt": " ".join(map(str, row))}) + "\n" for row in prompts]
    (folder / "prompts.jsonl").write_text("".join(rows))
    settings = {
        "model_name_or_path": str(folder / "model"),
        "value_model_path": str(folder / "reward"),
        "reward": str(folder / "reward"),
        "train_data": str(folder / "prompts.jsonl"),
        "output_dir": str(folder / "run"),
        "batch_size": ROWS,
        "max_prompt_length": PROMPT,
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "max_steps": STEPS,
        "report_to": [],
    }
    (folder / "ppo.yaml").write_text(yaml.safe_dump(settings))


def run(command: list[str]) -> dict[str, int]:
    """The last line of its output."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
