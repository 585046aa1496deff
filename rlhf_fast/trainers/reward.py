"""Reward model: pairs -> a score each -> Bradley-Terry loss -> step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.config import RewardConfig
from rlhf_fast.config_loading import check_config, check_paths
from rlhf_fast.data import ChatFormat, EpochOrder, Examples, PreferenceExample, load_rows, pad_right, preference_dataset
from rlhf_fast.distributed import World, all_reduce_max, all_reduce_sum, init_distributed
from rlhf_fast.engine import Engine
from rlhf_fast.models import (
    ScalarModel,
    add_adapters,
    check_positions,
    check_vocabulary,
    load_scalar_model,
    load_tokenizer,
    save_model,
    set_gradient_checkpointing,
)
from rlhf_fast.trainers.batching import check_ranks, count_steps, micro_batches, seed_everything, use_padding_free
from rlhf_fast.trainers.run import Metrics, Run
from rlhf_fast.trainers.run_folder import open_run_folder

SUMS = ("loss", "accuracy", "margin", "mean_reward")


class Totals:
    """SUMS, and the smallest and the largest reward, over the micro-batches of all ranks."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=world.device)
        self.most = torch.full((2,), -torch.inf, dtype=torch.float64, device=world.device)  # of -reward, of reward

    def add(self, sums: Tensor, rewards: Tensor) -> None:
        """Take in one micro-batch: sums of SUMS, and the reward of each sequence."""
        self.sums += sums
        self.most = torch.maximum(self.most, torch.stack([(-rewards).max(), rewards.max()]).double())

    def metrics(self, num_pairs: int) -> Metrics:
        """Means over the pairs by name, min_reward and max_reward."""
        means = all_reduce_sum(self.sums, self.world) / num_pairs
        least, most = all_reduce_max(self.most, self.world).tolist()
        return {**dict(zip(SUMS, means.tolist(), strict=True)), "min_reward": -least, "max_reward": most}


class RewardTrainer:
    """Train a sequence-classification model with one output to score chosen above rejected.

    Loss of a pair (Bradley and Terry 1952; margin: Touvron et al. 2023): -log sigmoid(r_chosen - r_rejected - margin).
    A sequence's score is read at its last token.
    """

    def __init__(self, config: RewardConfig, *, resume: bool = False) -> None:
        check_config(config)
        check_paths(config)
        self.config = config
        self.world = init_distributed()
        check_ranks(config, self.world)
        seed_everything(config.seed)
        self.tokenizer = load_tokenizer(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
        chat = ChatFormat(self.tokenizer, system_prompt=config.system_prompt, chat_template=config.chat_template)
        self.train_pairs = self._load(config.train_data, chat)
        self.eval_pairs = self._load(config.eval_data or [], chat)
        self.total_steps = count_steps(config, len(self.train_pairs), config.batch_size)
        self.model = load_scalar_model(
            config.model_name_or_path, dtype=config.dtype, trust_remote_code=config.trust_remote_code
        )
        check_vocabulary(self.model, self.tokenizer)
        pairs = [*self.train_pairs, *self.eval_pairs]
        longest = max(len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids))
        check_positions(self.model, longest, "lower max_length")
        if config.use_peft:
            add_adapters(self.model, config)
        set_gradient_checkpointing(self.model, config.gradient_checkpointing)
        self.padding_free = use_padding_free(config, [self.model], self.world)

        checkpoint = open_run_folder(config, self.world, resume=resume)
        self.scorer = Engine(ScalarModel(self.model), config=config, world=self.world, total_steps=self.total_steps)
        self.order = EpochOrder(
            len(self.train_pairs),
            config.batch_size,
            seed=config.seed,
            rank=self.world.rank,
            world_size=self.world.world_size,
        )
        self.run = Run(
            config,
            self.world,
            total_steps=self.total_steps,
            engines={"scorer": self.scorer},
            state={"order": self.order},
            evaluate=self.evaluate,
            exports={"final": self.export},
            better=lambda metrics: metrics["eval/accuracy"],
            checkpoint=checkpoint,
            headline={"loss": "loss", "accuracy": "accuracy", "eval/accuracy": "eval accuracy"},
            warnings=[data.report() for data in (self.train_pairs, self.eval_pairs) if data.bad_rows],
        )

    def train(self) -> None:
        """Run all steps that are left; writes the run's folder."""
        run = self.run
        for _step in run.steps():
            pairs = [self.train_pairs[i] for i in self.order.next()]
            with run.timer("train"):
                stats = self.accumulate(pairs)
                learning_rate = self.scorer.learning_rate
                result = self.scorer.step()
            run.check_finite(result.skipped)
            run.log(
                {
                    "epoch": self.order.epoch,
                    **stats,
                    "lr": learning_rate,
                    "grad_norm": result.grad_norm,
                    "num_tokens": all_reduce_sum(
                        sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs), self.world
                    ),
                }
            )

    def accumulate(self, pairs: Sequence[PreferenceExample]) -> Metrics:
        """Add the gradients of one step's pairs; returns means over the pairs of all ranks."""
        num_pairs = int(all_reduce_sum(len(pairs), self.world))
        batches = self._micro_batches(pairs)
        totals = Totals(self.world)
        for i, batch in enumerate(batches):
            # An empty one runs row 0 with no weight: see micro_batches.
            sums, rewards = self.loss_sums([pairs[j] for j in batch or [0]])
            self.scorer.backward(sums[0] / num_pairs if batch else 0.0 * sums[0], last=i == len(batches) - 1)
            if batch:
                totals.add(sums.detach(), rewards)
        return totals.metrics(num_pairs)

    def loss_sums(self, pairs: Sequence[PreferenceExample]) -> tuple[Tensor, Tensor]:
        """Sums over pairs of SUMS: loss (with gradient), correctly ordered pairs, score difference, mean score; and
        the scores, detached, of all sequences."""
        device = self.world.device
        sequences = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
        lengths = [len(ids) for ids in sequences]
        input_ids = pad_right(sequences, self.tokenizer.pad_token_id, device)
        rows = torch.arange(len(sequences), device=device)
        last = torch.tensor(lengths, device=device) - 1
        chosen, rejected = self.scorer(input_ids, rows, last, lengths=lengths).chunk(2)
        margin = torch.tensor([pair.margin for pair in pairs], dtype=chosen.dtype, device=device)
        loss = -F.logsigmoid(chosen - rejected - margin)
        if self.config.center_rewards_coefficient:
            loss = loss + self.config.center_rewards_coefficient * (chosen + rejected).square()
        difference = chosen - rejected
        sums = torch.stack([loss.sum(), (difference > 0).sum(), difference.sum(), (chosen + rejected).sum() / 2])
        return sums, torch.cat([chosen, rejected]).detach()

    @torch.no_grad()
    def evaluate(self, step: int) -> Metrics:
        """Loss, accuracy and margin over eval_data."""
        if not self.eval_pairs:
            return {}
        pairs = self.eval_pairs[self.world.rank :: self.world.world_size]
        totals = Totals(self.world)
        for batch in self._micro_batches(pairs):
            found = self.loss_sums([pairs[j] for j in batch] or self.eval_pairs[:1])
            if batch:
                totals.add(*found)
        metrics = {f"eval/{name}": value for name, value in totals.metrics(len(self.eval_pairs)).items()}
        accuracy = metrics["eval/accuracy"]
        metrics["eval/accuracy_stderr"] = (accuracy * (1 - accuracy) / len(self.eval_pairs)) ** 0.5  # binomial
        return metrics

    def export(self, folder: Path) -> None:
        """Write the model, or its adapters and head, as AutoModelForSequenceClassification loads it."""
        if self.config.system_prompt is not None:  # rewards/model.py puts it before what it scores
            self.model.config.system_prompt = self.config.system_prompt
        with self.scorer.gathered():
            if self.world.is_main:
                save_model(self.model, self.tokenizer, folder)

    def _micro_batches(self, pairs: Sequence[PreferenceExample]) -> list[list[int]]:
        both = [(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
        lengths = [sum(pair) if self.padding_free else 2 * max(pair) for pair in both]
        return micro_batches(lengths, self.config.micro_batch_tokens, self.world, padding_free=self.padding_free)

    def _load(self, path: str | list[str], chat: ChatFormat) -> Examples[PreferenceExample]:
        if not path:
            return Examples([], [])
        rows = load_rows(path, kind="preference", on_bad_row=self.config.on_bad_row)
        return preference_dataset(rows, chat, max_length=self.config.max_length)
