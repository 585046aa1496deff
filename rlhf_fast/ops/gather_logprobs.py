"""Log-probs of given ids and the entropy, from logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor

from rlhf_fast.ops import _checks, reference
from rlhf_fast.ops._dispatch import Backend, Implementation, choose_backend, load_compiled_ops


@overload
def gather_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: Literal[False] = False,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: Backend = "auto",
) -> Tensor: ...


@overload
def gather_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: Literal[True],
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...


def gather_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-softmax of logits / temperature at ids, and the entropy -sum p log p of the same distribution, in nats.

    Logits of -inf are tokens of probability 0: they add nothing to the entropy (0 * log 0 = 0) and get no gradient.

    Args:
        logits: [..., V], float64, float32, bfloat16 or float16; any strides.
        ids: [...] int64 or int32.
        temperature: above 0.
        return_entropy: also the entropy.
        ignore_index: ids equal to it give exactly 0 and no gradient, whatever the logits hold there.
        inplace_backward: the backward pass may write the gradient over the logits, which spares a tensor of their
            size. Only for logits that nothing else reads afterwards, in the backward pass included.
        backend: see rlhf_fast.ops.

    Returns:
        logprobs [...], or (logprobs, entropy): float64 for float64 logits, else float32; both differentiable.

    Raises:
        TypeError: a wrong dtype (float64 for Triton among them). ValueError: a wrong shape or number, ids out of range
        on the CPU (on a GPU their log-probs are NaN), a backend that there is not. rlhf_fast.errors.BuildError: the C++
        ops cannot be built.
    """
    _checks.logits("gather_logprobs", logits)
    _checks.ids("gather_logprobs", ids, logits.shape[:-1], "logits' without V", logits.device)
    _checks.temperature("gather_logprobs", temperature)
    implementation = choose_backend("gather_logprobs", backend, logits.device, logits.dtype)
    if implementation != "reference":
        logprobs, entropy = _compiled(implementation)(
            logits, ids, temperature, return_entropy, ignore_index, inplace_backward
        )
        return (logprobs, entropy) if return_entropy else logprobs
    unless = f"equal to ignore_index ({ignore_index})"
    _checks.ids_in_range("gather_logprobs", ids, logits.shape[-1], ids != ignore_index, unless)
    return reference.gather_logprobs(
        logits,
        ids,
        temperature=temperature,
        return_entropy=return_entropy,
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
    )


def _compiled(implementation: Implementation) -> Callable[..., tuple[Tensor, Tensor]]:
    if implementation == "cpp":
        load_compiled_ops()
        return torch.ops.rlhf_fast.gather_logprobs
    from rlhf_fast.kernels import gather_logprobs as kernel  # not at the top: a machine may have no Triton

    return kernel.gather_logprobs
