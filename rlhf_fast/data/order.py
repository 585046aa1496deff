"""Which rows come when: shuffled epochs that can be resumed at any batch, for any number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlhf_fast.errors import DataError


class EpochOrder:
    """An endless sequence of rows: one permutation of all rows an epoch, after the other, cut into global batches.

    Batches run across the borders of epochs, so that every row comes exactly once an epoch, whatever the batch size.
    The sequence depends on size and seed alone; a position in it is a count of rows over all ranks. So a state can be
    loaded into another batch size or number of ranks, and the rows go on where they stopped.

    size: rows of the data set. batch_size: rows of one global batch, a multiple of world_size. Rank r gets each
    world_size-th row of it, from the r-th on. Raises ValueError for numbers that do not fit.
    """

    def __init__(self, size: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if size < 1 or batch_size < 1:
            raise ValueError(f"size and batch_size must be at least 1, not {size} and {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to {world_size - 1}, not {rank}")
        if batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} must be a multiple of the number of ranks, {world_size}")
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.position = 0  # rows given out so far, over all ranks
        self._permutation: tuple[int, np.ndarray] | None = None  # (epoch, rows)

    @property
    def epoch(self) -> float:
        """Epochs done: 1.5 is half way through the second."""
        return self.position / self.size

    def next(self) -> list[int]:
        """Indices of this rank's rows in the next global batch: batch_size / world_size of them."""
        batch: list[int] = []
        while len(batch) < self.batch_size:
            epoch, offset = divmod(self.position + len(batch), self.size)
            batch += self._rows(epoch)[offset : offset + self.batch_size - len(batch)].tolist()
        self.position += self.batch_size
        return batch[self.rank :: self.world_size]

    def state_dict(self) -> dict[str, int]:
        """Seed, position and size: plain numbers, the same on all ranks."""
        return {"seed": self.seed, "position": self.position, "size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken, in its order. Raises DataError if the data set has another size now."""
        if state["size"] != self.size:
            raise DataError(
                f"the data set had {state['size']:,} usable rows when the checkpoint was written and has {self.size:,} "
                "now; go on with the same data, or start a new run from the checkpoint's model"
            )
        self.seed, self.position = int(state["seed"]), int(state["position"])
        self._permutation = None

    def _rows(self, epoch: int) -> np.ndarray:
        if self._permutation is None or self._permutation[0] != epoch:
            # Sorted random keys: numpy keeps a bit generator's raw stream the same for ever, unlike `permutation`.
            key = np.array([self.seed % 2**64, epoch], dtype=np.uint64)
            keys = np.random.Philox(key=key).random_raw(self.size)
            self._permutation = (epoch, np.argsort(keys, kind="stable"))
        return self._permutation[1]
