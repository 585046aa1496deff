"""Logits -> a token and its log-probs, a batch at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_fast import ops

from .params import SamplingParams
from .philox import uniforms

_BLOCK = 64  # positions whose random numbers are made at once


class Sampler:
    """Draws the tokens of one batch of rows, position after position.

    A row's token at a position depends on its own logits, its (seed, sample) and the position, not on its batch.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        samples: Sequence[int],
        stop_ids: Tensor,
        *,
        ops_backend: ops.Backend = "auto",
    ):
        """`prompts`, `seeds`, `samples`: one a row. `stop_ids` [S] int64: what may not be drawn before min_tokens."""
        self.params = params
        self.stop_ids = stop_ids
        self.ops_backend = ops_backend
        self._prompts, self._seeds, self._samples = prompts, seeds, samples
        self._uniforms = torch.empty(0)
        self._seen: Tensor | None = None  # [B, V] bool: in the prompt or drawn already

    def __call__(self, logits: Tensor, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """logits [B, V] fp32 -> tokens [B] int64, and their log-probs [B]: full distribution, distribution drawn from.

        The full distribution is softmax(logits / temperature), temperature 1 for greedy. Greedy draws from a point, so
        for it the second is after min_tokens and penalty, at temperature 1.
        """
        params = self.params
        allowed = self._processed(logits, position)
        if params.greedy:
            tokens = allowed.argmax(dim=-1)
        else:
            if params.temperature != 1.0:
                allowed = allowed / params.temperature
            allowed = filtered(allowed, min_p=params.min_p, top_k=params.top_k, top_p=params.top_p)
            tokens = draw(allowed, self._uniform(position, logits.device))
        logprobs = ops.gather_logprobs(logits, tokens, temperature=params.logprob_temperature, backend=self.ops_backend)
        plain = params.top_p == 1 and params.top_k < 1 and params.min_p == 0 and params.repetition_penalty == 1
        sampled = logprobs
        if not plain or position < params.min_tokens:
            sampled = ops.gather_logprobs(allowed, tokens, backend=self.ops_backend)
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        return tokens, logprobs, sampled

    def _processed(self, logits: Tensor, position: int) -> Tensor:
        """After min_tokens and the repetition penalty; the input itself when neither acts."""
        if position < self.params.min_tokens and len(self.stop_ids):
            logits = logits.index_fill(1, self.stop_ids, -torch.inf)
        penalty = self.params.repetition_penalty
        if penalty == 1:
            return logits
        if self._seen is None:
            self._seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            for row, prompt in zip(self._seen, self._prompts, strict=True):
                row[torch.tensor(prompt, device=logits.device)] = True
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        return torch.where(self._seen, penalised, logits)

    def _uniform(self, position: int, device: torch.device) -> Tensor:
        column = position % _BLOCK
        if column == 0:
            block = uniforms(self._seeds, self._samples, position, _BLOCK)
            self._uniforms = torch.from_numpy(block).to(device)
        return self._uniforms[:, column]


def filtered(logits: Tensor, *, min_p: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """logits [B, V] with -inf where min_p, then top_k, then top_p leave a token out. The likeliest always stays."""
    if min_p > 0:
        floor = logits.amax(dim=-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if 0 < top_k < logits.shape[-1]:
        last = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < last, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probs = ordered.softmax(dim=-1)
        before = probs.cumsum(dim=-1, dtype=torch.float64) - probs  # mass of the tokens ahead in the order
        out = torch.empty_like(before, dtype=torch.bool).scatter_(1, order, before >= top_p)
        logits = logits.masked_fill(out, -torch.inf)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token a row by the inverse of the cumulative distribution in vocabulary order.

    logits [B, V], uniform [B] fp64 in [0, 1) -> tokens [B] int64. The sum is in fp64: in fp32 its error over a large
    vocabulary would exceed the probability of rare tokens.
    """
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Below the total whatever the rounding, so that the token found has a probability above 0.
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return tokens.clamp(max=logits.shape[-1] - 1)  # NaN logits: found later by their log-prob
