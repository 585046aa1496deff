"""Checks of the ops' arguments. Each message names the op, the argument, what was given and what was wanted.

None of them reads a tensor's values on a GPU, which would wait for the device; only ids on the CPU are read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import get_args

import torch
from torch import Tensor

from rlhf_fast.config import KLEstimator


def floating(op: str, **tensors: Tensor | None) -> None:
    """Every tensor is a tensor of floating-point numbers; None is an argument left out."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor; got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must hold floating-point numbers; got {tensor.dtype}")


def shape(op: str, name: str, tensor: Tensor, wanted: Sequence[int], why: str) -> None:
    """The tensor's shape is the wanted one; `why` ends the message, e.g. "like mask"."""
    if tuple(tensor.shape) != tuple(wanted):
        raise ValueError(f"{op}: {name} must have shape {list(wanted)}, {why}; got {list(tensor.shape)}")


def same_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like the other arguments; got {tensor.device}")


def mask(op: str, tensor: Tensor, *, dims: int | None = None) -> None:
    """A bool mask, with that many dimensions if given."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: mask must be a tensor; got {type(tensor).__name__}")
    if tensor.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be bool; got {tensor.dtype} (mask.bool() if it holds 0 and 1)")
    if dims is not None and tensor.dim() != dims:
        raise ValueError(f"{op}: mask must have shape [B, T]; got {list(tensor.shape)}")


def per_token(op: str, like: Tensor, **tensors: Tensor | None) -> None:
    """Every tensor has the shape and device of the mask `like`."""
    floating(op, **tensors)
    for name, tensor in tensors.items():
        if tensor is not None:
            shape(op, name, tensor, like.shape, "like mask")
            same_device(op, name, tensor, like.device)


def per_row(op: str, like: Tensor, **tensors: Tensor | None) -> None:
    """Every tensor has shape [B] for a mask `like` of shape [B, T]."""
    floating(op, **tensors)
    for name, tensor in tensors.items():
        if tensor is not None:
            shape(op, name, tensor, like.shape[:1], "one for each row of mask")
            same_device(op, name, tensor, like.device)


def number(
    op: str,
    name: str,
    value: float | None,
    *,
    above: float = -math.inf,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    finite: bool = True,
) -> None:
    """A Python number (not a tensor) in the range; None is an argument left out."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{op}: {name} must be a number; got {type(value).__name__}")
    if value > above and minimum <= value <= maximum and not (finite and abs(value) == math.inf):
        return
    wanted = [f"above {above:g}"] if above > -math.inf else []
    wanted += [f"at least {minimum:g}"] if minimum > -math.inf else []
    wanted += [f"at most {maximum:g}"] if maximum < math.inf else ["finite"] if finite else []
    raise ValueError(f"{op}: {name} must be {' and '.join(wanted)}; got {value!r}")


def limit(op: str, name: str, value: float | None, *, above: float = -math.inf, minimum: float = -math.inf) -> None:
    """A number that infinity may stand for: what it limits is then not limited."""
    number(op, name, value, above=above, minimum=minimum, finite=False)


def temperature(op: str, value: float) -> None:
    number(op, "temperature", value, above=0.0)


def ids(op: str, tensor: Tensor, wanted: Sequence[int], why: str, device: torch.device) -> None:
    """Token ids: int64 or int32, of the wanted shape, on the device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: ids must be a tensor; got {type(tensor).__name__}")
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: ids must be int64 or int32; got {tensor.dtype}")
    shape(op, "ids", tensor, wanted, why)
    same_device(op, "ids", tensor, device)


def ids_in_range(op: str, tensor: Tensor, vocabulary: int, used: Tensor, unless: str) -> None:
    """Ids where `used` is True are in [0, vocabulary). Looks on the CPU only: on a GPU the outputs are NaN instead."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = used & ((tensor < 0) | (tensor >= vocabulary))
    if bad.any():
        where = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: ids must be from 0 to {vocabulary - 1}, unless {unless}; "
            f"got {int(tensor[tuple(where)])} at {where} ({int(bad.sum())} such ids)"
        )


def estimator(op: str, name: str) -> None:
    if name not in get_args(KLEstimator):
        raise ValueError(f"{op}: kl_estimator must be one of {', '.join(get_args(KLEstimator))}; got {name!r}")


def divisor(op: str, value: int | float | Tensor | None) -> None:
    """num_tokens: a positive number or a tensor with one element."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{op}: num_tokens must have one element; got shape {list(value.shape)}")
    else:
        number(op, "num_tokens", value, above=0.0)


def logits(op: str, tensor: Tensor) -> None:
    """Floating-point [..., V] with V > 0."""
    floating(op, logits=tensor)
    if tensor.dim() == 0 or tensor.shape[-1] == 0:
        raise ValueError(f"{op}: logits must have shape [..., V] with V > 0; got {list(tensor.shape)}")


def head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> None:
    """hidden [..., H] and the language-model head: weight [V, H], bias [V], softcap, scale."""
    floating(op, hidden=hidden, weight=weight, bias=bias)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"{op}: weight must have shape [V, H] with V > 0; got {list(weight.shape)}")
    if hidden.dim() == 0:
        raise ValueError(f"{op}: hidden must have shape [..., H]; got a 0-d tensor")
    shape(op, "hidden", hidden, [*hidden.shape[:-1], weight.shape[1]], f"H as in weight {list(weight.shape)}")
    same_device(op, "weight", weight, hidden.device)
    if bias is not None:
        shape(op, "bias", bias, weight.shape[:1], "V as in weight")
        same_device(op, "bias", bias, hidden.device)
    number(op, "softcap", softcap, above=0.0)
    number(op, "scale", scale, above=0.0)


def token_weights(op: str, weights: Tensor | None, like: Tensor) -> None:
    """One for each token of the mask `like`, or broadcast to that."""
    if weights is None:
        return
    floating(op, weights=weights)
    same_device(op, "weights", weights, like.device)
    fits = weights.dim() == like.dim() and all(w in (1, m) for w, m in zip(weights.shape, like.shape, strict=True))
    if not fits:
        raise ValueError(
            f"{op}: weights must have shape {list(like.shape)}, like mask, or 1 in place of a size; "
            f"got {list(weights.shape)}"
        )


def policy(
    op: str,
    like: Tensor,
    *,
    old_logprobs: Tensor,
    advantages: Tensor,
    cliprange: float,
    cliprange_high: float | None,
    dual_clip: float | None,
    weights: Tensor | None,
    ref_logprobs: Tensor | None,
    kl_coef: float,
    kl_estimator: KLEstimator,
    entropy_coef: float,
    num_tokens: int | float | Tensor | None,
) -> None:
    """The arguments that ppo_loss, logits_ppo_loss and linear_ppo_loss share; `like` is the mask."""
    mask(op, like)
    per_token(op, like, old_logprobs=old_logprobs, advantages=advantages, ref_logprobs=ref_logprobs)
    limit(op, "cliprange", cliprange, minimum=0.0)
    limit(op, "cliprange_high", cliprange_high, minimum=0.0)
    limit(op, "dual_clip", dual_clip, above=1.0)
    number(op, "kl_coef", kl_coef, minimum=0.0)
    number(op, "entropy_coef", entropy_coef)
    divisor(op, num_tokens)
    estimator(op, kl_estimator)
    if kl_estimator == "k1":
        raise ValueError(f"{op}: kl_estimator 'k1' has an expected gradient of zero in a loss; use 'k2' or 'k3'")
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"{op}: kl_coef {kl_coef:g} needs ref_logprobs, which is None")
    token_weights(op, weights, like)
