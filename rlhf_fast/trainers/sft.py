"""Supervised fine-tuning: examples -> log-probs of their tokens -> cross-entropy -> step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rlhf_fast.config import SFTConfig
from rlhf_fast.config_loading import check_config, check_paths
from rlhf_fast.data import (
    ChatFormat,
    EpochOrder,
    Examples,
    Pack,
    SFTExample,
    load_rows,
    pack,
    sft_dataset,
)
from rlhf_fast.distributed import init_distributed
from rlhf_fast.engine import Engine
from rlhf_fast.models import (
    PolicyModel,
    add_adapters,
    check_positions,
    check_vocabulary,
    load_causal_lm,
    load_tokenizer,
    save_model,
    set_gradient_checkpointing,
)
from rlhf_fast.trainers.batching import check_ranks, count_steps, seed_everything, use_padding_free
from rlhf_fast.trainers.cross_entropy import CrossEntropy
from rlhf_fast.trainers.run import Metrics, Run
from rlhf_fast.trainers.run_folder import open_run_folder


class SFTTrainer:
    """Fine-tune a causal LM on what `train_data`'s completions (or assistant turns) say.

    The loss of a step is the mean cross-entropy over the trained tokens of all its rows, on all ranks.
    """

    def __init__(self, config: SFTConfig, *, resume: bool = False) -> None:
        check_config(config)
        check_paths(config)
        self.config = config
        self.world = init_distributed()
        check_ranks(config, self.world)
        seed_everything(config.seed)
        self.tokenizer = load_tokenizer(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
        chat = ChatFormat(self.tokenizer, system_prompt=config.system_prompt, chat_template=config.chat_template)
        train, held_out = self._load(config.train_data, chat), self._load(config.eval_data or [], chat)
        self.train_packs, self.eval_packs = self._packs(train), self._packs(held_out)
        self.total_steps = count_steps(config, len(self.train_packs), config.batch_size)
        self.model = load_causal_lm(
            config.model_name_or_path, dtype=config.dtype, trust_remote_code=config.trust_remote_code
        )
        check_vocabulary(self.model, self.tokenizer)
        longest = max(len(example.input_ids) for example in [*train, *held_out])
        check_positions(self.model, longest, "lower max_length")
        if config.use_peft:
            add_adapters(self.model, config)
        set_gradient_checkpointing(self.model, config.gradient_checkpointing)
        use_padding_free(config, [self.model], self.world)

        checkpoint = open_run_folder(config, self.world, resume=resume)
        self.policy = Engine(PolicyModel(self.model), config=config, world=self.world, total_steps=self.total_steps)
        self.cross_entropy = CrossEntropy(
            self.world,
            pad_id=self.tokenizer.pad_token_id,
            micro_batch_tokens=config.micro_batch_tokens,
            ops_backend=config.ops_backend,
        )
        self.order = EpochOrder(
            len(self.train_packs),
            config.batch_size,
            seed=config.seed,
            rank=self.world.rank,
            world_size=self.world.world_size,
        )
        self.run = Run(
            config,
            self.world,
            total_steps=self.total_steps,
            engines={"policy": self.policy},
            state={"order": self.order},
            evaluate=self.evaluate,
            exports={"final": self.export},
            better=lambda metrics: -metrics["eval/loss"],
            checkpoint=checkpoint,
            headline={"loss": "loss", "eval/loss": "eval loss", "perf/tokens_per_s": "tok/s"},
            warnings=[data.report() for data in (train, held_out) if data.bad_rows],
        )

    def train(self) -> None:
        """Run all steps that are left; writes the run's folder."""
        run = self.run
        for _step in run.steps():
            examples = [example for i in self.order.next() for example in self.train_packs[i]]
            with run.timer("train"):
                stats = self.accumulate(examples)
                learning_rate = self.policy.learning_rate
                result = self.policy.step()
            run.check_finite(result.skipped)
            run.log(
                {
                    "epoch": self.order.epoch,
                    **stats,
                    "lr": learning_rate,
                    "grad_norm": result.grad_norm,
                }
            )

    def accumulate(self, examples: Sequence[SFTExample]) -> Metrics:
        """Add the gradients of one step's examples; returns means over the trained tokens of all ranks."""
        num_tokens = self.cross_entropy.count(examples)
        shares = []
        for found, last in self.cross_entropy.losses(self.policy, examples, num_tokens, spare=examples[0]):
            self.policy.backward(found.loss, last=last)
            shares.append(found)
        return {**self.cross_entropy.means(shares), "num_tokens": num_tokens}

    @torch.no_grad()
    def evaluate(self, step: int) -> Metrics:
        """Mean cross-entropy and accuracy over the trained tokens of eval_data."""
        if not self.eval_packs:
            return {}
        mine = self.eval_packs[self.world.rank :: self.world.world_size]
        examples = [example for members in mine for example in members]
        num_tokens = self.cross_entropy.count(examples)
        losses = self.cross_entropy.losses(self.policy, examples, num_tokens, spare=self.eval_packs[0][0])
        return {f"eval/{name}": value for name, value in self.cross_entropy.means([x for x, _ in losses]).items()}

    def export(self, folder: Path) -> None:
        """Write the model, or its adapters, as transformers loads it."""
        with self.policy.gathered():
            if self.world.is_main:
                save_model(self.model, self.tokenizer, folder)

    def _load(self, path: str | list[str], chat: ChatFormat) -> Examples[SFTExample]:
        config = self.config
        if not path:
            return Examples([], [])
        rows = load_rows(path, kind="sft", on_bad_row=config.on_bad_row)
        return sft_dataset(rows, chat, max_length=config.max_length, completion_only_loss=config.completion_only_loss)

    def _packs(self, examples: Sequence[SFTExample]) -> list[Pack]:
        return pack(examples, self.config.max_length) if self.config.packing else [[example] for example in examples]
