"""The step loop of the C++ decoder, csrc/generation/decoder.h, on whatever device its backend is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_fast.build import load_generation
from rlhf_fast.errors import NonFiniteError

from .abort import AbortFlag
from .decoded import NAN_LOGITS, Decoded, Request
from .params import FinishReason, SamplingParams
from .stop_strings import StopStrings

_FINISH: list[FinishReason] = ["abort", "stop", "length"]  # as C++ numbers them


@dataclass
class Counts:
    """What a call did, besides tokens."""

    prompt_tokens: int  # that went through the model: shared ones once, those of evicted rows again
    evictions: int  # rows that gave up their part of a full cache and started over
    peak_cache_bytes: int
    looks: int  # at the abort flag, which ended the work on it as well


def complete(
    backend: Any,
    prompts: Sequence[Sequence[int]],
    requests: Sequence[Request],
    params: SamplingParams,
    *,
    stop_ids: Sequence[int],
    watchers: Sequence[StopStrings] | None,
    abort: AbortFlag,
    max_batch_size: int,
    cache_bytes: int | None,
    prefill_tokens: int | None = None,
) -> tuple[Decoded, Counts]:
    """Completes all requests on `backend`, a Backend of the C++ module, up to max_batch_size at a time; a row that ends
    makes room for one that waits.

    A request ends at a token of `stop_ids` (in order), by its watcher, at its limit or by `abort`. A row's tokens and
    log-probs do not depend on the others, nor on cache_bytes, as far as the backend's arithmetic does not.
    `prefill_tokens`: of prompts, in one step.

    Raises NonFiniteError: NaN logits. ValueError: cache_bytes is too small for one row alone.
    """
    cpp = load_generation()
    rows, width = len(requests), max(request.limit for request in requests)
    tokens = torch.zeros(rows, width, dtype=torch.int64)
    mask = torch.zeros(rows, width, dtype=torch.bool)
    logprobs, sampled_logprobs = torch.zeros(2, rows, width)
    finish = torch.zeros(rows, dtype=torch.int8)

    options = _options(cpp, params, stop_ids, max_batch_size, cache_bytes)
    if prefill_tokens is not None:
        options.prefill_tokens = prefill_tokens

    def stopped(rows: list[int], new: list[int]) -> list[bool]:
        assert watchers is not None
        return [watchers[row].add(token) for row, token in zip(rows, new, strict=True)]

    stats = cpp.decode(
        backend,
        prompts,
        [cpp.Request(r.prompt, r.limit, r.seed % 2**64, r.sample) for r in requests],
        options,
        threads=torch.get_num_threads(),
        abort=abort.address,
        stopped=None if watchers is None else stopped,
        width=width,
        tokens=tokens.data_ptr(),
        mask=mask.data_ptr(),
        logprobs=logprobs.data_ptr(),
        sampled_logprobs=sampled_logprobs.data_ptr(),
        finish=finish.data_ptr(),
    )
    if not stats.finite:
        raise NonFiniteError(NAN_LOGITS)
    longest = int(mask.sum(dim=1).max())
    decoded = Decoded(
        tokens[:, :longest].contiguous(),
        mask[:, :longest].contiguous(),
        logprobs[:, :longest].contiguous(),
        sampled_logprobs[:, :longest].contiguous(),
        [_FINISH[number] for number in finish.tolist()],
        [None] * rows if watchers is None else [watcher.completed for watcher in watchers],
    )
    return decoded, Counts(stats.prompt_tokens, stats.evictions, stats.peak_cache_bytes, stats.looks)


def _options(
    cpp: Any, params: SamplingParams, stop_ids: Sequence[int], max_batch_size: int, cache_bytes: int | None
) -> Any:
    sampling, options = cpp.SamplingOptions(), cpp.Options()
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "top_k", "min_tokens"):
        setattr(sampling, name, getattr(params, name))
    options.sampling, options.stop_ids = sampling, list(stop_ids)
    options.max_rows, options.cache_bytes = max_batch_size, cache_bytes or 0
    return options
