"""What is asked of a generator and what it answers. Names and meanings are vLLM's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. Filters act in vLLM's order: min_tokens, penalty, temperature, min_p, top_k, top_p.

    Raises ValueError (TypeError for a wrong type) that names the field.
    """

    n: int = 1  # completions a prompt
    temperature: float = 1.0  # 0: greedy, with log-probs at temperature 1
    top_p: float = 1.0  # the most likely tokens that together reach this probability; 1: off
    top_k: int = 0  # that many most likely tokens (ties with the last one stay); 0 or -1: off
    min_p: float = 0.0  # tokens at least this fraction as likely as the likeliest; 0: off
    repetition_penalty: float = 1.0  # logits of tokens seen, prompt included: > 0 divided by it, < 0 multiplied; 1: off
    max_tokens: int = 16
    min_tokens: int = 0  # before that many tokens nothing stops a completion
    stop: str | Sequence[str] | None = None  # texts that end a completion and are cut off its text; tokens are kept
    stop_token_ids: Sequence[int] | None = None  # besides EOS
    ignore_eos: bool = False
    seed: int | None = None  # the same for each prompt; None: new ones from torch's generator

    def __post_init__(self) -> None:
        for name in ("n", "top_k", "max_tokens", "min_tokens"):
            _require(name, getattr(self, name), _is_int, "a whole number")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            _require(name, getattr(self, name), _is_finite, "a finite number")
        _require("ignore_eos", self.ignore_eos, lambda v: isinstance(v, bool), "true or false")
        _require("seed", self.seed, lambda v: v is None or _is_int(v), "a whole number or None")
        _check("n", self.n, self.n >= 1, "at least 1")
        _check("temperature", self.temperature, self.temperature >= 0, "at least 0 (0 is greedy)")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (1 is off)")
        _check("top_k", self.top_k, self.top_k >= -1, "at least 1, or 0 or -1 for off")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 (off) to 1")
        _check("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0 (1 is off)")
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        within = 0 <= self.min_tokens <= self.max_tokens
        _check("min_tokens", self.min_tokens, within, f"from 0 to max_tokens ({self.max_tokens})")
        for text in self.stop_strings:
            _require("stop", text, lambda v: isinstance(v, str), "a string or a list of strings")
            _check("stop", text, text != "", "not empty: every text contains the empty string")
        for token in self.stop_token_ids or ():
            _require("stop_token_ids", token, _is_int, "a list of whole numbers")
            _check("stop_token_ids", token, token >= 0, "at least 0")

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def logprob_temperature(self) -> float:
        """The temperature of reported log-probs."""
        return self.temperature or 1.0


@dataclass(frozen=True)
class Completion:
    """One completion of one prompt."""

    prompt_ids: list[int]
    token_ids: list[int]  # EOS or the stop token kept
    text: str  # without EOS, stop token, special tokens, and what follows from a stop string on; "" without a tokenizer
    logprobs: list[float]  # of each token in the full distribution at the temperature, in nats
    sampled_logprobs: list[float]  # of each token in what it was drawn from, after min_tokens, penalty and filters
    finish_reason: FinishReason


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require(name: str, value: Any, holds: Any, expected: str) -> None:
    if not holds(value):
        raise TypeError(f"{name}: {expected} was expected, got {value!r}")


def _check(name: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: must be {expected}, got {value!r}")
