"""Run by test_split.py under torchrun: the same PPO run, once for each ZeRO stage, on as many ranks as there are."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import rlhf_fast.engine
from rlhf_fast import PPOConfig, PPOTrainer
from rlhf_fast.distributed import gather_objects, init_distributed
from rlhf_fast.trainers.batching import micro_batches


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [text.count("a") - 0.1 * len(text) for text in completions]


def main(config_file: Path, folder: Path, stages: list[int]) -> None:
    world = init_distributed("cpu")
    base = PPOConfig(**json.loads(config_file.read_text()))
    lengths = [[5, 3, 5, 3, 3], [2, 2]][world.rank % 2]
    splits = [micro_batches(lengths, 6, world, padding_free=padding_free) for padding_free in (True, False)]
    of_ranks = gather_objects(splits, world)
    if world.is_main:
        (folder / "micro_batches.json").write_text(json.dumps(of_ranks))
    for stage in stages:
        # A budget of its own for each number of ranks, so that micro-batches differ too.
        config = replace(
            base,
            zero_stage=stage,
            micro_batch_tokens=base.micro_batch_tokens * world.world_size,
            output_dir=str(folder / f"stage-{stage}"),
        )
        trainer = PPOTrainer(config, reward=reward)
        seen: list[str] = []
        next_prompts = trainer.next_prompts

        def recorded(next_prompts=next_prompts, seen=seen):
            prompts = next_prompts()
            seen += [prompt.prompt for prompt in prompts]
            return prompts

        trainer.next_prompts = recorded  # type: ignore[method-assign]
        trainer.train()
        with trainer.models.policy.gathered():
            weights = [parameter.detach().clone() for parameter in trainer.models.causal_lm.parameters()]
        prompts = sorted(prompt for of_rank in gather_objects(seen, world) for prompt in of_rank)
        if world.is_main:
            torch.save({"weights": weights, "prompts": prompts}, folder / f"stage-{stage}.pt")


if __name__ == "__main__":
    rlhf_fast.engine.PERSISTENT = 0  # ZeRO-3 would keep all of these small weights whole
    main(Path(sys.argv[1]), Path(sys.argv[2]), [int(stage) for stage in sys.argv[3:]])
