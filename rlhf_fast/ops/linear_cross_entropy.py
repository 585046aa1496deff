"""Cross-entropy of tokens, from hidden states and the head."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from rlhf_fast.ops import _checks, reference
from rlhf_fast.ops._dispatch import Backend, Implementation, choose_backend
from rlhf_fast.ops._head_chunks import HeadChunks, Rows, fake_gradients, with_gradients
from rlhf_fast.ops._loss_rows import (
    CROSS_ENTROPY_COLUMNS,
    cross_entropy_rows_,
    cross_entropy_summary,
)
from rlhf_fast.ops._types import CrossEntropyLoss
from rlhf_fast.ops.reference._common import compute_dtype, token_count


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    weights: Tensor | None = None,
    num_tokens: int | float | Tensor | None = None,
    backend: Backend = "auto",
) -> CrossEntropyLoss:
    """-sum of weights * `linear_logprobs(hidden, weight, ids)` over the mask, divided by num_tokens: SFT's loss.

    The gradients are made together with the loss, chunk by chunk, with three matrix products in all. The backward pass
    hands them on, or scales them in place where the loss's own gradient is not 1: after that a second backward pass is
    an error. Without a gradient (torch.no_grad) it is one product. The logits are never in memory as a whole.

    Under ZeRO-3 call it inside the nn.Module that owns `weight`, so that the weight is there.

    Args:
        hidden: [..., H], the state before each token.
        weight: [V, H], the head; gets a gradient, as hidden and bias do.
        ids: [...] int64 or int32, the tokens; not looked at outside the mask.
        mask: [...] bool, True for trained tokens. What stands elsewhere, NaN too, reaches nothing.
        bias, softcap, scale: the head's, as in `linear_logprobs`.
        weights: [...] or 1 in place of a size; of each token in the loss, not in the statistics.
        num_tokens: masked tokens of the optimiser step over all ranks and micro-batches; None: this call's, at least 1.
        backend: see rlhf_fast.ops.

    Returns:
        CrossEntropyLoss(loss, stats): logprobs [...] and accuracy. float64 if an input is, else float32.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or number, ids out of range on the CPU (on a GPU the loss is
        NaN), a backend that there is not.
    """
    _checks.mask("linear_cross_entropy", mask)
    _checks.head("linear_cross_entropy", hidden, weight, bias, softcap, scale)
    _checks.shape("linear_cross_entropy", "hidden", hidden, [*mask.shape, weight.shape[1]], "mask's and weight's H")
    _checks.same_device("linear_cross_entropy", "hidden", hidden, mask.device)
    _checks.ids("linear_cross_entropy", ids, mask.shape, "like mask", mask.device)
    _checks.ids_in_range("linear_cross_entropy", ids, weight.shape[0], mask, "masked out")
    _checks.token_weights("linear_cross_entropy", weights, mask)
    _checks.divisor("linear_cross_entropy", num_tokens)
    head_dtype, dtype = compute_dtype(hidden, weight, bias), compute_dtype(hidden, weight, bias, weights)
    implementation = choose_backend("linear_cross_entropy", backend, mask.device, dtype)
    if implementation == "reference":
        return reference.linear_cross_entropy(
            hidden, weight, ids, mask, bias=bias, softcap=softcap, scale=scale, weights=weights, num_tokens=num_tokens
        )
    count = token_count(mask, num_tokens, torch.float64 if implementation == "cpp" else torch.float32)
    head = (hidden, weight, bias)
    found, *gradients = _rows(
        hidden.detach(),
        weight.detach(),
        ids,
        mask,
        None if bias is None else bias.detach(),
        None if weights is None else weights.detach().expand(mask.shape),
        count,
        softcap,
        scale,
        implementation,
        [torch.is_grad_enabled() and x is not None and x.requires_grad for x in head],
    )
    result = cross_entropy_summary(found, mask, count, dtype, head_dtype)
    return result._replace(loss=with_gradients(result.loss, head, gradients))


@torch.library.custom_op("rlhf_fast::_linear_cross_entropy", mutates_args=())
def _rows(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    num_tokens: Tensor,
    softcap: float | None,
    scale: float,
    implementation: str,
    gradients: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `cross_entropy_rows_` finds of all rows, and the gradients of hidden, weight and bias that are asked for."""
    head = HeadChunks(hidden, weight, bias, mask, temperature=1.0, softcap=softcap, scale=scale, gradients=gradients)
    found = num_tokens.new_zeros(CROSS_ENTROPY_COLUMNS, mask.numel())

    def kernel(rows: Rows, logits: Tensor) -> None:
        found[:, rows] = cross_entropy_rows_(
            cast(Implementation, implementation),
            logits,
            ids.reshape(-1)[rows],
            mask.reshape(-1)[rows],
            None if weights is None else weights.reshape(-1)[rows],
            num_tokens,
            temperature=head.temperature,
        )

    head.run(kernel)
    return (found, *head.gradients())


@_rows.register_fake
def _rows_fake(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, mask, bias, _, num_tokens, *_, gradients = arguments
    return (num_tokens.new_empty(CROSS_ENTROPY_COLUMNS, mask.numel()), *fake_gradients(hidden, weight, bias, gradients))
