"""What goes into a backend besides tokens, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .params import FinishReason

NAN_LOGITS = (
    "the model's logits are NaN: its weights are damaged, or numbers overflowed (float16 ends at 65504; "
    "try bfloat16 or float32)."
)


@dataclass(frozen=True)
class Request:
    """One completion to make: sample `sample` of `seed`, for prompt number `prompt`, of at most `limit` tokens."""

    prompt: int
    limit: int
    seed: int
    sample: int


@dataclass
class Decoded:
    """What a backend gave: [B, t] tensors, 0 outside mask; t is the longest response."""

    tokens: Tensor
    mask: Tensor
    logprobs: Tensor
    sampled_logprobs: Tensor
    finish_reasons: list[FinishReason]
    texts: list[str | None]  # up to a stop string where one ended the row
