"""Sequences end to end in one row, without padding, each attending to itself alone.

All of a model but its attention works on single tokens, so it may as well read the tokens of many sequences as one row
[1, N], with positions that restart at 0 at each border. The attention is called once for each sequence, on its part of
that row and with the mask that transformers makes for it: the same function as in a padded batch, whatever its kernel.
(One mask for the row, by which transformers keeps packed sequences apart, is of size [N, N]: on a CPU it makes
attention over 16 sequences of 100 tokens six times as slow.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "per_sequence_"  # before "sdpa" or "eager": what transformers calls these implementations


@dataclass(frozen=True)
class _Masks:
    """In place of one mask for a row: the tokens of each sequence in it, and the mask among them (None: causal)."""

    lengths: list[int]
    masks: list[Tensor | None]


# Set while a model reads sequences end to end. Its masks are made then; layers that gradient checkpointing runs a
# second time get them as arguments.
_lengths: ContextVar[list[int] | None] = ContextVar("lengths", default=None)


def switch_attention(model: Any, backbone: nn.Module) -> None:
    """Let a transformers model read sequences end to end, if its attention is of a kind that can.

    All other calls are as before. Whether the model leaves its masks to transformers is to be tried.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    kind = _implementation(backbone)
    if kind in ("sdpa", "eager") and model._can_set_attn_implementation():
        AttentionInterface.register(PREFIX + kind, _sdpa if kind == "sdpa" else _eager)
        AttentionMaskInterface.register(PREFIX + kind, partial(_mask, sdpa_mask if kind == "sdpa" else eager_mask))
        model.set_attn_implementation(PREFIX + kind)


def switch_back(model: Any, backbone: nn.Module) -> None:
    """The attention that was there before switch_attention."""
    model.set_attn_implementation(_implementation(backbone).removeprefix(PREFIX))


def is_switched(backbone: nn.Module) -> bool:
    """Whether the model reads sequences end to end."""
    return _implementation(backbone).startswith(PREFIX)


def end_to_end(input_ids: Tensor, lengths: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
    """input_ids [b, L] int64, right-padded, and the tokens of each row -> input_ids and position_ids [1, N] of all
    tokens, N = sum(lengths); and where each row starts among these, [b] int64."""
    counts = torch.tensor(lengths, device=input_ids.device)
    columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    inside = columns < counts[:, None]
    row = {"input_ids": input_ids[inside][None], "position_ids": columns[inside][None]}
    return row, counts.cumsum(0) - counts


@contextmanager
def borders(lengths: Sequence[int]) -> Iterator[None]:
    """Inside, a switched model reads one row that holds sequences of these lengths."""
    token = _lengths.set(list(lengths))
    try:
        yield
    finally:
        _lengths.reset(token)


def _implementation(backbone: nn.Module) -> str:
    config: Any = backbone.config
    return str(config._attn_implementation)


def _mask(make: Callable[..., Tensor | None], **options: Any) -> Tensor | _Masks | None:
    """transformers' `make`, once for each sequence; options are of the row, mask_function speaks of places in it."""
    lengths = _lengths.get()
    if lengths is None:
        return make(**options)
    # create_causal_mask forbids to leave out the mask of a row with borders. There are none inside a sequence.
    options["allow_is_causal_skip"] = not options.get("use_vmap", False)
    masks, start = [], 0
    for length in lengths:
        size, offset = dict.fromkeys(("q_length", "kv_length"), length), dict.fromkeys(("q_offset", "kv_offset"), start)
        masks.append(make(**{**options, **size, **offset}))
        start += length
    return _Masks(lengths, masks)


def _sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return _per_sequence(sdpa_attention_forward, module, (query, key, value), mask, options)


def _eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    attend = sys.modules[type(module).__module__].eager_attention_forward  # each architecture has its own
    return _per_sequence(attend, module, (query, key, value), mask, options)


def _per_sequence(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    inputs: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | _Masks | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """query, key, value [b, heads, L, head size] -> [b, L, heads, head size], and what else `attend` gives."""
    if not isinstance(mask, _Masks):
        return attend(module, *inputs, mask, **options)
    parts = zip(*(x.split(mask.lengths, dim=2) for x in inputs), mask.masks, strict=True)
    return torch.cat([attend(module, *part, **options)[0] for part in parts], dim=1), None
