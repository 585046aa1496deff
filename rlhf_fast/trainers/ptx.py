"""PPO-ptx (Ouyang et al. 2022, equation 2): supervised tokens beside the rollouts, so that the policy forgets less.

Each optimiser step of the policy adds unsup_coef times the mean cross-entropy of rows of unsup_data: as many rows as
the step has completions, the next ones in an order of their own.
"""

from __future__ import annotations

from rlhf_fast.config import PPOConfig
from rlhf_fast.data import ChatFormat, EpochOrder, load_rows, sft_dataset
from rlhf_fast.distributed import World
from rlhf_fast.engine import Engine
from rlhf_fast.trainers.cross_entropy import CrossEntropy
from rlhf_fast.trainers.run import Metrics


class PTXMixture:
    """Rows of unsup_data and their share of the policy's gradients. Raises DataError for rows that cannot be used.

    A global batch of rows is dealt out to the ranks, which may have one more or fewer; the loss is divided by the
    tokens of all of it, so that the update is the same for any number of ranks and any micro-batches.
    """

    def __init__(self, config: PPOConfig, chat: ChatFormat, pad_id: int, world: World) -> None:
        self.coef, self.world = config.unsup_coef, world
        rows = load_rows(config.unsup_data or [], kind="unsup", on_bad_row=config.on_bad_row)
        self.rows = sft_dataset(rows, chat, max_length=config.max_length)
        self.order = EpochOrder(len(self.rows), config.batch_size // config.num_mini_batches, seed=config.seed)
        self.cross_entropy = CrossEntropy(
            world, pad_id=pad_id, micro_batch_tokens=config.micro_batch_tokens, ops_backend=config.ops_backend
        )

    def accumulate(self, policy: Engine) -> Metrics:
        """Add the gradients of the next rows; the step's own, which come after them, must end with last=True."""
        rows = [self.rows[i] for i in self.order.next()[self.world.rank :: self.world.world_size]]
        num_tokens = self.cross_entropy.count(rows)
        shares = []
        for found, _ in self.cross_entropy.losses(policy, rows, num_tokens, spare=self.rows[0]):
            policy.backward(self.coef * found.loss, last=False)
            shares.append(found)
        return {"loss/ptx_avg": self.cross_entropy.means(shares)["loss"]}
