"""TRL's PPO on a folder that memory_trl.py made: prints the bytes of its process, as JSON.

A script for the environment of `make bench-trl`, which has TRL and not this project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.process_memory import peak, start_watching


def main(folder: Path, rows: int, new: int, steps: int) -> None:
    import datasets
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    baseline = start_watching()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    data = datasets.Dataset.from_dict({"input_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts]})
    settings: dict[str, Any] = {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1,
        "num_mini_batches": 1,
        "num_ppo_epochs": 1,
        "total_episodes": steps * rows,
        "response_length": new,
        "local_rollout_forward_batch_size": rows,
        "num_sample_generations": 0,
        "temperature": 1.0,
        "kl_coef": 0.05,
        "learning_rate": 1e-6,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
    }
    PPOTrainer(
        args=PPOConfig(**settings),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        ref_model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        reward_model=AutoModelForSequenceClassification.from_pretrained(folder / "reward"),
        value_model=AutoModelForSequenceClassification.from_pretrained(folder / "reward"),
        train_dataset=data,
        eval_dataset=data,
    ).train()
    print(json.dumps({"baseline": baseline, "measured": peak() - baseline}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
