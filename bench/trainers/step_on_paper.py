"""The cost model of `rlhf-fast plan` beside measured PPO steps on this CPU.

    OMP_NUM_THREADS=2 python -m bench.trainers.step_on_paper [--shape 110M] [--rows 8]

The machine of the model is this one: the rate of a product of the shape's own size and that of reading memory, both
measured just before, both taken whole (efficiency 1). So the ratio says what the model leaves out: all that is neither
a product nor reading weights. Times are the medians of the run's own, steps 2 and on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.generation.shapes import SHAPES
from rlhf_fast.cli import set_environment
from rlhf_fast.config import PPOConfig

STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="15M")
    parser.add_argument("--rows", type=int, default=16)
    args = parser.parse_args()
    set_environment()  # as the command line does, before torch is there
    import torch

    from bench.trainers.memory_trl import NEW, PROMPT
    from rlhf_fast.scaling import Machine, llama, step_cost

    shape = SHAPES[args.shape]
    tokens = args.rows * (PROMPT + NEW)
    x, weight = torch.randn(tokens, shape["hidden_size"]), torch.randn(shape["intermediate_size"], shape["hidden_size"])
    flops = 2.0 * x.numel() * len(weight) / fastest(lambda: torch.nn.functional.linear(x, weight))
    numbers = torch.ones(2**27)
    bandwidth = 4.0 * numbers.numel() / fastest(numbers.sum)
    del numbers
    with tempfile.TemporaryDirectory() as folder:
        measured = run(Path(folder), args.shape, args.rows)
    machine = Machine(0, flops, bandwidth, 1, 1, efficiency=1, reading=1)
    config = PPOConfig(
        model_name_or_path="-", train_data="-", batch_size=args.rows, max_prompt_length=PROMPT, max_new_tokens=NEW
    )
    model = llama(
        layers=shape["num_hidden_layers"],
        hidden=shape["hidden_size"],
        intermediate=shape["intermediate_size"],
        heads=shape["num_attention_heads"],
        kv_heads=shape["num_key_value_heads"],
        vocabulary=shape["vocab_size"],
        tied=True,
    )
    cost = step_cost(model, config, machine, 1).seconds
    print(f"{flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s, {torch.get_num_threads()} threads")
    print(f"| {args.shape}, {args.rows} rows | on paper, s | measured, s | ratio |\n|---|---|---|---|")
    for phase, seconds in {**measured, "all": sum(measured.values())}.items():
        paper = sum(cost.values()) if phase == "all" else cost[phase]
        print(f"| {phase} | {paper:.2f} | {seconds:.2f} | {paper / seconds:.2f} |")


def fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of ten calls."""
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def run(folder: Path, shape: str, rows: int) -> dict[str, float]:
    """Seconds a step of each phase."""
    from bench.trainers.memory_trl import write_inputs
    from rlhf_fast import PPOTrainer
    from rlhf_fast.config_loading import load_config

    write_inputs(folder, shape)
    (folder / "reward.py").write_text("def reward(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n")
    overrides = [f"reward={folder / 'reward.py'}:reward", f"batch_size={rows}", f"max_steps={STEPS}"]
    PPOTrainer(load_config(PPOConfig, folder / "ppo.yaml", overrides)).train()
    steps = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()][1:]
    return {name: statistics.median(row[f"time/{name}"] for row in steps) for name in ("rollout", "score", "train")}


if __name__ == "__main__":
    main()
