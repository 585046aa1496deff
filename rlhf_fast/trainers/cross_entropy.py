"""Cross-entropy of supervised examples on one engine: what SFT learns from, and PPO's mixture of supervised tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from rlhf_fast import ops
from rlhf_fast.data import SFTExample, pad_right
from rlhf_fast.distributed import World, all_reduce_sum
from rlhf_fast.engine import Engine
from rlhf_fast.models import is_padding_free
from rlhf_fast.trainers.batching import micro_batches
from rlhf_fast.trainers.run import Metrics


class CrossEntropy:
    """Mean cross-entropy over the trained tokens of rows on all ranks, micro-batch by micro-batch."""

    def __init__(self, world: World, *, pad_id: int, micro_batch_tokens: int, ops_backend: ops.Backend) -> None:
        self.world, self.pad_id = world, pad_id
        self.micro_batch_tokens, self.ops_backend = micro_batch_tokens, ops_backend

    def count(self, rows: Sequence[SFTExample]) -> int:
        """Trained tokens of rows on all ranks, at least 1."""
        return max(int(all_reduce_sum(sum(sum(row.loss_mask[1:]) for row in rows), self.world)), 1)

    def losses(
        self, engine: Engine, rows: Sequence[SFTExample], num_tokens: int, spare: SFTExample
    ) -> Iterator[tuple[ops.CrossEntropyLoss, bool]]:
        """(loss and accuracy of a micro-batch as sums over its tokens divided by num_tokens, whether it is the last).

        As many on every rank: one that has fewer rows runs `spare` without weight.
        """
        lengths, padding_free = [len(row.input_ids) for row in rows], is_padding_free(engine.module)
        batches = micro_batches(lengths, self.micro_batch_tokens, self.world, padding_free=padding_free)
        for i, batch in enumerate(batches):
            found = self._loss(engine, [rows[j] for j in batch] or [spare], num_tokens, used=bool(batch))
            yield found, i == len(batches) - 1

    def means(self, shares: Sequence[ops.CrossEntropyLoss]) -> Metrics:
        """Loss and accuracy of all micro-batches on all ranks."""
        parts = torch.stack([torch.stack([share.loss.detach(), share.stats["accuracy"]]) for share in shares])
        loss, accuracy = all_reduce_sum(parts.double().sum(0), self.world).tolist()
        return {"loss": loss, "mean_token_accuracy": accuracy}

    def _loss(self, engine: Engine, rows: Sequence[SFTExample], num_tokens: int, *, used: bool) -> ops.CrossEntropyLoss:
        device = self.world.device
        input_ids = pad_right([row.input_ids for row in rows], self.pad_id, device)
        trained = pad_right([row.loss_mask for row in rows], 0, device).bool()
        trained[:, 0] = False  # nothing comes before the first token
        index, position = trained.nonzero(as_tuple=True)
        return engine(
            input_ids,
            index,
            position - 1,
            input_ids[index, position],
            lengths=[len(row.input_ids) for row in rows],
            ops_backend=self.ops_backend,
            mask=torch.full_like(index, used, dtype=torch.bool),
            num_tokens=num_tokens,
        )
