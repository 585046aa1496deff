"""Completions as tensors, for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .params import FinishReason


@dataclass
class Rollout:
    """B completions. Tensors are over response tokens, [B, T], right-padded, 0 outside `mask`.

    T is the longest response. Row i*n + j is sample j of prompt i.
    """

    prompt_ids: list[list[int]]  # one a row
    tokens: Tensor  # [B, T] int64
    mask: Tensor  # [B, T] bool; EOS or stop token included
    logprobs: Tensor  # [B, T] fp32, nats: the full distribution at the temperature
    sampled_logprobs: Tensor  # [B, T] fp32: the distribution that was drawn from, after penalty and filters
    finish_reasons: list[FinishReason]  # one a row

    @property
    def finished(self) -> Tensor:
        """[B] bool: ended by EOS, a stop token or a stop string; False: cut by max_tokens or abort."""
        ended = [reason == "stop" for reason in self.finish_reasons]
        return torch.tensor(ended, dtype=torch.bool, device=self.mask.device)

    @property
    def lengths(self) -> Tensor:
        """[B] int64: response tokens of each row."""
        return self.mask.sum(dim=1)

    def sequences(self, pad_id: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Prompts with their responses, and where each response token is predicted.

        Returns:
            input_ids [B, L] int64, right-padded with pad_id; and for the N masked tokens, row by row: rows [N],
            positions [N] (of the state that predicts the token: its own place minus one), ids [N], all int64.
        """
        device, (count, width) = self.tokens.device, self.tokens.shape
        prompt_lengths = torch.tensor([len(prompt) for prompt in self.prompt_ids], dtype=torch.int64, device=device)
        longest = int((prompt_lengths + self.lengths).max()) if count else 0
        padded = [prompt + [pad_id] * (longest + width - len(prompt)) for prompt in self.prompt_ids]
        input_ids = torch.tensor(padded, dtype=torch.int64, device=device).reshape(count, longest + width)
        rows, columns = self.mask.nonzero(as_tuple=True)
        ids, places = self.tokens[rows, columns], prompt_lengths[rows] + columns
        input_ids[rows, places] = ids
        return input_ids[:, :longest].contiguous(), rows, places - 1, ids

    def scatter(self, flat: Tensor) -> Tensor:
        """flat [N], one number a masked token in the order of `sequences` -> [B, T], 0 elsewhere; differentiable."""
        return flat.new_zeros(self.mask.shape).masked_scatter(self.mask, flat)

    def select(self, indices: Sequence[int] | Tensor) -> Rollout:
        """Some rows, in that order. T stays, so that other [B, T] tensors indexed the same way fit."""
        index = torch.as_tensor(indices, dtype=torch.int64, device=self.mask.device)
        chosen = index.tolist()
        return Rollout(
            [self.prompt_ids[i] for i in chosen],
            self.tokens[index],
            self.mask[index],
            self.logprobs[index],
            self.sampled_logprobs[index],
            [self.finish_reasons[i] for i in chosen],
        )
