"""Decoding with transformers' generate: one logits processor samples, one stopping criterion ends.

Runs any causal language model. The model's parameters are used in place.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from rlhf_fast.errors import NonFiniteError
from rlhf_fast.ops import Backend

from .abort import AbortFlag
from .decoded import NAN_LOGITS, Decoded
from .params import SamplingParams
from .sampler import Sampler
from .stop_strings import StopStrings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Decoding:
    """The state of one batch, called by generate twice a step: as processor, then as stopping criterion.

    Only the chosen token and its log-probs are kept of a step, never the logits.
    """

    def __init__(
        self,
        sampler: Sampler,
        limit: int,
        rows: int,
        stop_ids: Tensor,
        watchers: Sequence[StopStrings] | None,
        abort: AbortFlag,
    ):
        device = stop_ids.device
        self.sampler, self.limit, self.stop_ids, self.watchers, self.abort = sampler, limit, stop_ids, watchers, abort
        self.step = 0
        self.active = torch.ones(rows, dtype=torch.bool, device=device)
        self.stopped = torch.zeros(rows, dtype=torch.bool, device=device)
        self.aborted = torch.zeros(rows, dtype=torch.bool, device=device)
        self.columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # a step each: tokens, active, log-probs

    def sample(self, logits: Tensor) -> Tensor:
        """logits [B, V] -> scores whose argmax is our token. Finished rows get token 0, which nobody sees."""
        tokens, logprobs, sampled = self.sampler(logits, self.step)
        tokens = torch.where(self.active, tokens, 0)
        self.columns.append((tokens, self.active, logprobs, sampled))
        return logits.fill_(-torch.inf).scatter_(1, tokens[:, None], 0.0)

    def finished(self) -> Tensor:
        """After a step: which rows [B] take no more tokens."""
        tokens, active, _, _ = self.columns[-1]
        self.step += 1
        stopped = (tokens[:, None] == self.stop_ids).any(dim=1)
        if self.watchers is not None:
            going = (active & ~stopped).tolist()
            found = [going[row] and self.watchers[row].add(token) for row, token in enumerate(tokens.tolist())]
            stopped = stopped | torch.tensor(found, device=stopped.device)
        self.stopped = self.stopped | (stopped & active)
        self.active = active & ~stopped
        if self.step >= self.limit:
            self.active = torch.zeros_like(self.active)
        elif self.abort.is_set():
            self.aborted, self.active = self.active, torch.zeros_like(self.active)
        return ~self.active

    def result(self) -> Decoded:
        tokens, active, logprobs, sampled = (torch.stack(part, dim=1) for part in zip(*self.columns, strict=True))
        width = int(active.sum(dim=1).max())
        mask = active[:, :width]
        if bool((logprobs[:, :width].isnan() & mask).any()):
            raise NonFiniteError(NAN_LOGITS)
        stopped, aborted = self.stopped.tolist(), self.aborted.tolist()
        return Decoded(
            tokens[:, :width],
            mask,
            torch.where(mask, logprobs[:, :width].float(), 0.0),
            torch.where(mask, sampled[:, :width].float(), 0.0),
            ["stop" if s else "abort" if a else "length" for s, a in zip(stopped, aborted, strict=True)],
            [None] * len(mask) if self.watchers is None else [watcher.completed for watcher in self.watchers],
        )


class _Processor(LogitsProcessor):
    def __init__(self, decoding: _Decoding):
        self.decoding = decoding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.decoding.sample(scores)


class _Criterion(StoppingCriteria):
    def __init__(self, decoding: _Decoding):
        self.decoding = decoding

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return self.decoding.finished()


def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    *,
    limit: int,
    stop_ids: Tensor,
    watchers: Sequence[StopStrings] | None,
    abort: AbortFlag,
) -> Decoded:
    """Completes one batch of prompts, at most `limit` tokens each. Rows end at a token of `stop_ids` [S], by their
    watcher, or all together by `abort`; the call ends with the last row.

    Raises NonFiniteError for NaN logits.
    """
    decoding = _Decoding(sampler, limit, len(prompts), stop_ids, watchers, abort)
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=stop_ids.device)
    attention_mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=stop_ids.device)
    with torch.no_grad(), _ready(model):
        model.generate(
            input_ids,
            attention_mask=attention_mask,
            generation_config=GenerationConfig(
                max_new_tokens=limit, do_sample=False, use_cache=True, pad_token_id=0, disable_compile=True
            ),
            logits_processor=[_Processor(decoding)],
            stopping_criteria=[_Criterion(decoding)],
            synced_gpus=False,  # under ZeRO-3 the weights are gathered before a rollout
        )
    return decoding.result()


def can_batch(model: PreTrainedModel, *, ops_backend: Backend = "auto") -> bool:
    """Whether a row decodes the same beside a longer one, padding before it; tried on a few tokens, warns if not.

    RWKV, for one, reads padding as text. Too strict an answer costs speed alone.
    """
    greedy = SamplingParams(temperature=0, max_tokens=2)
    device = model.device
    step = max(model.get_input_embeddings().weight.shape[0] // 8, 1)
    short, long = [step], [step * i for i in range(2, 7)]

    def logprobs(prompts: list[list[int]]) -> Tensor:
        rows, none = len(prompts), torch.tensor([], dtype=torch.int64, device=device)
        sampler = Sampler(greedy, prompts, [0] * rows, [0] * rows, none, ops_backend=ops_backend)
        return decode(model, prompts, sampler, limit=2, stop_ids=none, watchers=None, abort=AbortFlag()).logprobs[0]

    rounding = 1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2
    same = bool((logprobs([short]) - logprobs([short, long])).abs().max() < rounding)
    if not same:
        warnings.warn(
            f"{type(model).__name__} does not decode in batches; prompts are decoded one by one", stacklevel=2
        )
    return same


@contextlib.contextmanager
def _ready(model: Any) -> Iterator[None]:
    """Eval mode, no sampling settings of the model's own, the head in fp32; all put back afterwards."""
    training = [module for module in model.modules() if module.training]
    own_config = model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        with _fp32_head(model.get_output_embeddings()):
            yield
    finally:
        model.generation_config = own_config
        for module in training:
            module.training = True


@contextlib.contextmanager
def _fp32_head(head: Any) -> Iterator[None]:
    """The head's product in fp32 where its weights are half precision, as in training; costs a copy of the weights.

    Logits rounded to 8 bits would move log-probs by tenths, and the importance ratio with them.
    """
    if head.weight.dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    weight = head.weight.float()
    bias = None if getattr(head, "bias", None) is None else head.bias.float()
    head.forward = lambda hidden: F.linear(hidden.float(), weight, bias)
    try:
        yield
    finally:
        del head.forward
