"""Log-probs of given ids and the entropy, from hidden states and the head."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from rlhf_fast.ops import _checks, reference
from rlhf_fast.ops._dispatch import REFERENCE_ONLY, Backend, choose_backend


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    return_entropy: Literal[False] = False,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> Tensor: ...


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    return_entropy: Literal[True],
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`gather_logprobs` of the logits of a linear head, which are never in memory as a whole, [N, V].

        logits = (hidden @ weight.T + bias) * scale;  softcap * tanh(logits / softcap) if softcap;  then / temperature

    The product and the softmax are in fp32 (float64 for float64 inputs), whatever the weights' dtype. `scale` and
    `softcap` are what Cohere, Granite and Gemma 2 do to their logits. Under ZeRO-3 call it inside the nn.Module that
    owns `weight`, so that the weight is there.

    Args:
        hidden: [..., H], the state that predicts each id.
        weight: [V, H]; hidden, weight and bias get gradients, the weight's summed in fp32.
        ids: [...] int64 or int32.
        bias: [V] or None.
        temperature: above 0.
        softcap: above 0, or None.
        scale: factor of the logits.
        return_entropy: also the entropy of the distribution, in nats.
        ignore_index: ids equal to it give exactly 0 and no gradient, whatever hidden holds there.
        backend: see rlhf_fast.ops.

    Returns:
        logprobs [...], or (logprobs, entropy): float64 if an input is, else float32; both differentiable.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or number, ids out of range on the CPU (on a GPU their
        log-probs are NaN), a backend that there is not.
    """
    _checks.head("linear_logprobs", hidden, weight, bias, softcap, scale)
    _checks.ids("linear_logprobs", ids, hidden.shape[:-1], "hidden's without H", hidden.device)
    _checks.temperature("linear_logprobs", temperature)
    unless = f"equal to ignore_index ({ignore_index})"
    _checks.ids_in_range("linear_logprobs", ids, weight.shape[0], ids != ignore_index, unless)
    choose_backend("linear_logprobs", backend, REFERENCE_ONLY, hidden.device)
    return reference.linear_logprobs(
        hidden,
        weight,
        ids,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        scale=scale,
        return_entropy=return_entropy,
        ignore_index=ignore_index,
    )
