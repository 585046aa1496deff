"""Generator: prompts in, completions or a rollout out, whatever decodes."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from rlhf_fast.errors import BuildError
from rlhf_fast.ops import Backend

from . import cpp_backend, cuda_backend, transformers_backend
from .abort import AbortFlag
from .decoded import Decoded, Request
from .model_spec import Spec, UnsupportedError, describe
from .params import Completion, SamplingParams
from .rollout import Rollout
from .sampler import Sampler
from .stop_strings import StopStrings
from .streaming import Pieces, StreamedText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class GeneratorStats:
    """Counts since the generator was made."""

    backend: str  # what decoded last, or will first: "cpp", "cuda" or "transformers"
    prompt_tokens: int = 0  # of all completions
    prefilled_tokens: int = 0  # of them those that went through the model; the own decoder shares equal beginnings
    generated_tokens: int = 0
    seconds: float = 0.0  # prefill included
    evictions: int = 0  # rows that gave their part of a full cache back for a while, in the own decoder
    peak_cache_bytes: int = 0  # keys and values at most; with transformers of the largest batch, by the model's config

    @property
    def tokens_per_s(self) -> float:
        return self.generated_tokens / self.seconds if self.seconds else 0.0


class Generator:
    """Completes prompts with a causal language model, whose parameters are used in place.

    `model`: a transformers model, or a PolicyModel or SharedModel around one, on any device, also while DeepSpeed
    trains it; it is put in eval mode for each call. After an optimiser step the next call sees the new weights.
    `tokenizer`: needed for prompts given as text, for texts of completions and for stop strings.

    `backend`: "cpp" is the project's own decoder, on the CPU for the families of model_spec.py, "cuda" the same on a
    GPU; "transformers" runs any model; "auto" takes the one for the model's device where it can, and says in a warning
    why it cannot. `max_batch_size`: rows decoded together. `cache_bytes`: what the own decoder may use for keys and
    values; rows wait where that is too little for all. None of these changes a row's tokens on the CPU; docs/gpu.md
    says what a GPU does.

    EOS is the tokenizer's and the ones in the model's generation_config; nothing else of that config is used.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        backend: Literal["auto", "cpp", "cuda", "transformers"] = "auto",
        max_batch_size: int = 64,
        cache_bytes: int | None = None,
        ops_backend: Backend = "auto",
    ):
        if backend not in ("auto", "cpp", "cuda", "transformers"):
            raise ValueError(f"backend: 'auto', 'cpp', 'cuda' or 'transformers' was expected, got {backend!r}")
        for name, value in (("max_batch_size", max_batch_size), ("cache_bytes", cache_bytes)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        inner: Any = model if hasattr(model, "generate") else getattr(model, "model", None)
        if not hasattr(inner, "generate"):
            raise TypeError(f"model: a causal language model was expected, got {type(model).__name__}")
        self.model, self.tokenizer = inner, tokenizer
        self.backend, self.ops_backend = backend, ops_backend
        self.max_batch_size, self.cache_bytes = max_batch_size, cache_bytes
        self.stats = GeneratorStats(self._own_backend() or "transformers")
        self._why_not: str | None = None  # the own decoder, as warned of
        self._can_batch: bool | None = None  # tried at need
        self._abort = AbortFlag()
        self._busy = threading.Lock()

    def generate(self, prompts: Sequence[str] | Sequence[Sequence[int]], params: SamplingParams) -> list[Completion]:
        """params.n completions for each prompt (text or token ids), in the prompts' order.

        Raises ValueError: an empty prompt, ids out of range, no room in the model's context, text or stop strings
        without a tokenizer, a cache too small for one row, backend="cpp" or "cuda" for a model that it does not know.
        NonFiniteError: NaN logits.
        """
        prompt_ids = [self._encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        results = self._run(prompt_ids, params, None)
        stop_ids = set(self._stop_ids(params))
        completions = []
        for row, reason in enumerate(results.finish_reasons):
            length = int(results.mask[row].sum())
            tokens = results.tokens[row, :length].tolist()
            text = results.texts[row]
            if text is None:
                spoken = tokens[:-1] if reason == "stop" and tokens[-1] in stop_ids else tokens
                text = self.tokenizer.decode(spoken, skip_special_tokens=True) if self.tokenizer else ""
            completions.append(
                Completion(
                    prompt_ids[row // params.n],
                    tokens,
                    text,
                    results.logprobs[row, :length].tolist(),
                    results.sampled_logprobs[row, :length].tolist(),
                    reason,
                )
            )
        return completions

    def stream(self, prompt: str | Sequence[int], params: SamplingParams) -> Pieces:
        """The text of one completion in pieces, while it is decoded; together they are the text that `generate` gives,
        less a character that max_tokens cuts in two. Closing it (.close()) ends the decoding.

        Raises ValueError: no tokenizer, params.n above 1. The first piece raises what `generate` does.
        """
        if self.tokenizer is None:
            raise ValueError("stream: text needs a tokenizer; give Generator one")
        if params.n != 1:
            raise ValueError(f"stream: one completion at a time, got n={params.n}")
        prompt_ids = self._encode(prompt) if isinstance(prompt, str) else list(prompt)
        text = StreamedText(self.tokenizer, self._watched(params), params.min_tokens)
        return text.pieces(lambda: self._run([prompt_ids], params, None, text))

    def rollout(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, seeds: Sequence[int] | None = None
    ) -> Rollout:
        """params.n completions a prompt as tensors on the model's device. Row i*n + j is sample j of prompt i.

        `seeds`: one a prompt, instead of params.seed. Raises as `generate` does.
        """
        prompts = [list(prompt) for prompt in prompt_ids]
        results = self._run(prompts, params, seeds)
        return Rollout(
            [prompt for prompt in prompts for _ in range(params.n)],
            results.tokens,
            results.mask,
            results.logprobs,
            results.sampled_logprobs,
            results.finish_reasons,
        )

    def abort(self) -> None:
        """Ends the call that is running in another thread: in C++ in the middle of a step, else after it.

        Its unfinished completions keep their tokens so far and say "abort". Without a running call it does nothing.
        """
        self._abort.set()

    def release_cache(self) -> None:
        """Gives cached memory back before training. The key-value cache itself ends with each call."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _run(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        seeds: Sequence[int] | None,
        watcher: StopStrings | None = None,
    ) -> Decoded:
        """`watcher`: of the only row, where it is not to be a new one."""
        limits = [self._limit(i, prompt, params) for i, prompt in enumerate(prompts)]
        seeds = self._seeds(len(prompts), params, seeds)
        requests = [Request(i, limits[i], seeds[i], j) for i in range(len(prompts)) for j in range(params.n)]
        if params.min_tokens and len(self._stop_ids(params)) >= self.model.get_input_embeddings().weight.shape[0]:
            raise ValueError("min_tokens: every token is a stop token, so that none is left to draw before them")
        stop = self._watched(params)
        watchers = [StopStrings(self.tokenizer, stop, params.min_tokens) for _ in requests] if stop else None
        watchers = watchers if watcher is None else [watcher]
        if not requests:
            return self._empty(0)
        with self._busy:
            self._abort.clear()
            started = time.perf_counter()
            lengths = [len(prompt) for prompt in prompts]
            spec = self._spec(min(lengths), max(length + limit for length, limit in zip(lengths, limits, strict=True)))
            if spec is None:
                decoded = self._decode_in_batches(prompts, requests, params, watchers)
            else:
                decoded = self._decode_together(spec, prompts, requests, params, watchers)
            self.stats.prompt_tokens += sum(len(prompts[request.prompt]) for request in requests)
            self.stats.generated_tokens += int(decoded.mask.sum())
            self.stats.seconds += time.perf_counter() - started
        return decoded

    def _own_backend(self) -> str | None:
        """Which of the own decoder's backends is to decode; None where it is transformers' work."""
        if self.backend == "auto":
            return {"cpu": "cpp", cuda_backend.DEVICE: "cuda"}.get(self.model.device.type)
        return None if self.backend == "transformers" else self.backend

    def _spec(self, shortest: int, longest: int) -> Spec | None:
        """The model as the own decoder wants it; None where transformers decodes."""
        self.stats.backend = "transformers"
        backend = self._own_backend()
        if backend is None:
            return None
        try:
            spec = describe(self.model, shortest, longest, cuda_backend.DEVICE if backend == "cuda" else "cpu")
            if backend == "cuda":
                cuda_backend.check(spec, self.model.device)
        except (UnsupportedError, BuildError) as error:
            if self.backend == backend:
                raise error if isinstance(error, BuildError) else ValueError(f"backend '{backend}': {error}") from error
            if str(error) != self._why_not:
                self._why_not = str(error)
                name = "C++" if backend == "cpp" else "CUDA"
                warnings.warn(f"transformers decodes instead of {name}: {error}", stacklevel=5)
            return None
        self.stats.backend = backend
        return spec

    def _decode_together(
        self,
        spec: Spec,
        prompts: list[list[int]],
        requests: list[Request],
        params: SamplingParams,
        watchers: list[StopStrings] | None,
    ) -> Decoded:
        backend = cuda_backend if self.stats.backend == "cuda" else cpp_backend
        decoded, counts = backend.decode(
            spec,
            prompts,
            requests,
            params,
            stop_ids=self._stop_ids(params),
            watchers=watchers,
            abort=self._abort,
            max_batch_size=self.max_batch_size,
            cache_bytes=self.cache_bytes,
        )
        self.stats.prefilled_tokens += counts.prompt_tokens
        self.stats.evictions += counts.evictions
        self.stats.peak_cache_bytes = max(self.stats.peak_cache_bytes, counts.peak_cache_bytes)
        return decoded

    def _decode_in_batches(
        self,
        prompts: list[list[int]],
        requests: list[Request],
        params: SamplingParams,
        watchers: list[StopStrings] | None,
    ) -> Decoded:
        results = self._empty(len(requests))
        stop_ids = torch.tensor(self._stop_ids(params), dtype=torch.int64, device=self.model.device)
        for batch in self._batches([r.limit for r in requests], [len(prompts[r.prompt]) for r in requests]):
            chosen = [requests[row] for row in batch]
            batch_prompts = [prompts[request.prompt] for request in chosen]
            sampler = Sampler(
                params,
                batch_prompts,
                [request.seed for request in chosen],
                [request.sample for request in chosen],
                stop_ids,
                ops_backend=self.ops_backend,
            )
            decoded = transformers_backend.decode(
                self.model,
                batch_prompts,
                sampler,
                limit=chosen[0].limit,
                stop_ids=stop_ids,
                watchers=[watchers[row] for row in batch] if watchers else None,
                abort=self._abort,
            )
            _put(results, batch, decoded)
            self.stats.prefilled_tokens += sum(map(len, batch_prompts))
            cached = len(batch) * (max(map(len, batch_prompts)) + decoded.mask.shape[1]) * _cache_bytes(self.model)
            self.stats.peak_cache_bytes = max(self.stats.peak_cache_bytes, cached)
            if self._abort.is_set():
                break
        return results

    def _limit(self, index: int, prompt: list[int], params: SamplingParams) -> int:
        """How many tokens the prompt may get: max_tokens, less where the model's context ends."""
        if not prompt:
            raise ValueError(f"prompt {index} is empty; a completion needs at least one token to start from")
        size = self.model.get_input_embeddings().weight.shape[0]
        wrong = next((token for token in prompt if not 0 <= token < size), None)
        if wrong is not None:
            raise ValueError(f"prompt {index}: token id {wrong} is out of range; the model has ids 0 to {size - 1}")
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = params.max_tokens if context is None else context - len(prompt)
        if room < 1:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens; the model's context holds {context}, which leaves no room "
                "for a completion. Shorten the prompt"
            )
        return min(params.max_tokens, room)

    def _batches(self, limits: list[int], lengths: list[int]) -> list[list[int]]:
        """Rows decoded together: of like length, so that padding is small, and with one limit, so that no row runs past
        the model's context while it waits for the others."""
        if self._can_batch is None and len(limits) > 1:
            self._can_batch = transformers_backend.can_batch(self.model, ops_backend=self.ops_backend)
        size = self.max_batch_size if self._can_batch else 1
        batches: list[list[int]] = []
        for row in sorted(range(len(limits)), key=lambda row: (-limits[row], lengths[row])):
            if batches and len(batches[-1]) < size and limits[batches[-1][0]] == limits[row]:
                batches[-1].append(row)
            else:
                batches.append([row])
        return batches

    def _seeds(self, count: int, params: SamplingParams, seeds: Sequence[int] | None) -> list[int]:
        if seeds is not None:
            if len(seeds) != count:
                raise ValueError(f"seeds: one a prompt was expected ({count}), got {len(seeds)}")
            return list(seeds)
        if params.seed is not None:
            return [params.seed] * count
        return torch.randint(2**63 - 1, (count,)).tolist()

    def _stop_ids(self, params: SamplingParams) -> list[int]:
        """Tokens that end a completion: EOS, params.stop_token_ids, and stop strings that are special tokens."""
        ids = set(params.stop_token_ids or ())
        if not params.ignore_eos:
            eos = self.model.generation_config.eos_token_id
            ids.update([eos] if isinstance(eos, int) else eos or [])
            if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
                ids.add(self.tokenizer.eos_token_id)
        ids.update(self._special(params).values())
        size = self.model.get_input_embeddings().weight.shape[0]
        return sorted(token for token in ids if token < size)

    def _special(self, params: SamplingParams) -> dict[str, int]:
        """Stop strings that are special tokens: the text leaves those out, so they are watched for by id."""
        if not params.stop_strings or self.tokenizer is None:
            return {}
        special = dict(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True))
        return {text: special[text] for text in params.stop_strings if text in special}

    def _watched(self, params: SamplingParams) -> list[str]:
        if params.stop_strings and self.tokenizer is None:
            raise ValueError("stop: stop strings need a tokenizer; give Generator one, or use stop_token_ids")
        special = self._special(params)
        return [text for text in params.stop_strings if text not in special]

    def _encode(self, prompt: str) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("prompts given as text need a tokenizer; give Generator one, or give token ids")
        return self.tokenizer(prompt)["input_ids"]

    def _empty(self, rows: int) -> Decoded:
        """No tokens anywhere: what an aborted call leaves of the rows that it did not reach."""
        device = self.model.device
        return Decoded(
            torch.zeros(rows, 0, dtype=torch.int64, device=device),
            torch.zeros(rows, 0, dtype=torch.bool, device=device),
            torch.zeros(rows, 0, device=device),
            torch.zeros(rows, 0, device=device),
            ["abort"] * rows,
            [None] * rows,
        )


def _cache_bytes(model: Any) -> int:
    """Keys and values of one token, by the config; 0 where it does not say: no attention, or layers that differ."""
    config = model.config.get_text_config()
    try:
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_value_heads = getattr(config, "num_key_value_heads", None) or heads
        return 2 * config.num_hidden_layers * key_value_heads * size * model.dtype.itemsize
    except (AttributeError, RuntimeError):
        return 0


def _put(results: Decoded, batch: list[int], decoded: Decoded) -> None:
    """Writes a batch's rows to their places, widening the tensors as needed."""
    width = decoded.mask.shape[1]
    rows = torch.tensor(batch, device=decoded.mask.device)
    for name in ("tokens", "mask", "logprobs", "sampled_logprobs"):
        whole = getattr(results, name)
        if whole.shape[1] < width:
            whole = nn.functional.pad(whole, (0, width - whole.shape[1]))
            setattr(results, name, whole)
        whole[rows, :width] = getattr(decoded, name)
    for row, reason, text in zip(batch, decoded.finish_reasons, decoded.texts, strict=True):
        results.finish_reasons[row], results.texts[row] = reason, text
