"""CUDA graphs of the decoder's passes: one launch a step instead of hundreds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

# A batch size is recorded once it has come that often: what comes less often is not worth it, and the first passes
# make all that PyTorch makes at first use, which a recording must not hold.
TIMES_BEFORE = 4


class CudaGraphs:
    """The graphs of one call, one a batch size. Lengths, pages and tokens lie on the device, so a graph serves every
    position; how many tokens it is for is all that is fixed.
    """

    def __init__(self) -> None:
        self._times: Counter[int] = Counter()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def replay(self, tokens: int, launch: Callable[[int], None]) -> bool:
        """As csrc/generation/cuda/torch.h has it."""
        if tokens not in self._graphs:
            self._times[tokens] += 1
            if self._times[tokens] <= TIMES_BEFORE:
                return False
            graph = torch.cuda.CUDAGraph()
            # Another thread, a reward function's for one, may use the GPU meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                launch(torch.cuda.current_stream().cuda_stream)
            self._graphs[tokens] = graph
        self._graphs[tokens].replay()
        return True
