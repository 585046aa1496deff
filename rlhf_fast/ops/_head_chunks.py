"""A language-model head a few rows at a time: logits that are never in memory as a whole, and the head's gradients.

The products are PyTorch's libraries', the fastest there are. What becomes of a chunk's logits is the row kernels' work,
in place: they leave the gradient of the loss where the logits were, and two more products take it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.ops._dispatch import Implementation, load_compiled_ops

# Rows whose logits exist at once. More rows share what a chunk costs, a pass over the weight in two products and over
# its gradient in the third; fewer rows take less memory. On a CPU 64 rows are near the full rate, and 3% of the logits
# of 2048 tokens; a GPU needs more to be kept busy. It is always that number, the last chunk filled up with rows that
# nobody reads: a product of another shape may add in another order, and then a row would depend on how many there are.
CHUNK_ROWS = {"cpu": 64, "cuda": 512}

# A half-precision weight is cast on a CPU as it is used, so many elements at a time (4 MB in fp32), again in each
# chunk: the products take a seventh longer, and a whole copy in fp32 would be a third of the logits of 2048 tokens.
CAST_ELEMENTS = 2**20

# What is done with the logits [n, V] of the used rows `rows`, in place. They hold d loss / d logits after it, unless no
# gradient is needed.
RowKernel = Callable[[slice, Tensor], None]


class HeadChunks:
    """softcap(scale * (hidden @ weight.T + bias)) / temperature of the used rows, and its gradients.

    `temperature` as an attribute is what a row kernel has to divide by: it has the scale in it, which so costs nothing.
    Rows that are not used are left out on a CPU. On a GPU nobody knows how many these are without waiting for it, so
    they are zeros there, and the row kernel has to give them no gradient.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        used: Tensor,
        *,
        temperature: float,
        softcap: float | None,
        scale: float,
        gradients: tuple[bool, bool, bool] = (False, False, False),
    ) -> None:
        """hidden [..., H], weight [V, H], bias [V], used [...] bool; gradients: which of the first three need one."""
        self.dtype = compute_dtype(hidden, weight, bias)
        self.hidden, self.weight = hidden.reshape(-1, hidden.shape[-1]), weight
        self.bias = None if bias is None else bias.to(self.dtype)
        self.cap_scale = None if softcap is None else scale / softcap
        self.temperature = temperature / (scale if softcap is None else softcap)
        self.shape, self.used = used.shape, used.reshape(-1)
        self.index = used_rows(self.used)
        self.count = len(self.used if self.index is None else self.index)

        # Tensor cores multiply half-precision numbers as they are, and add in fp32.
        half = hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16)
        self.product_dtype = hidden.dtype if half else self.dtype
        self.x = hidden.new_zeros(CHUNK_ROWS[hidden.device.type], hidden.shape[-1], dtype=self.product_dtype)
        self.grad_hidden, self.grad_weight, self.grad_bias = (
            x.new_zeros(x.shape, dtype=self.dtype) if x is not None and needed else None
            for x, needed in zip((self.hidden, weight, bias), gradients, strict=True)
        )

    def take(self, x: Tensor) -> Tensor:
        """The used rows' numbers of x [..., *more], for the row kernel."""
        x = x.reshape(-1, *x.shape[len(self.shape) :])
        return x if self.index is None else x[self.index]

    def put(self, x: Tensor) -> Tensor:
        """The reverse: x's numbers where they belong, and 0 elsewhere."""
        if self.index is not None:
            x = x.new_zeros(len(self.used), *x.shape[1:]).index_copy_(0, self.index, x)
        return x.reshape((*self.shape, *x.shape[1:]))

    def run(self, kernel: RowKernel) -> None:
        """All chunks, one after the other; the gradients that are needed are added up."""
        size = len(self.x)
        with torch.autocast(self.x.device.type, enabled=False):
            for start in range(0, self.count, size):
                rows = slice(start, min(start + size, self.count))
                self._run(kernel, rows)  # in a call of its own: its logits are gone before the next ones come

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden, weight and bias, in fp32 (float64); [0] where none is needed."""
        hidden = None if self.grad_hidden is None else self.grad_hidden.reshape((*self.shape, self.hidden.shape[1]))
        found = [
            self.x.new_empty(0, dtype=self.dtype) if x is None else x
            for x in (hidden, self.grad_weight, self.grad_bias)
        ]
        return found[0], found[1], found[2]

    def _run(self, kernel: RowKernel, rows: slice) -> None:
        n = rows.stop - rows.start
        at = rows if self.index is None else self.index[rows]
        x = self.hidden[at]
        self.x[:n] = x if self.index is not None else torch.where(self.used[rows, None], x, 0)
        logits = self._logits()
        if self.cap_scale is not None:
            logits.mul_(self.cap_scale).tanh_()
        with_gradient = any(g is not None for g in (self.grad_hidden, self.grad_weight, self.grad_bias))
        capped = logits.clone() if with_gradient and self.cap_scale is not None else None

        kernel(rows, logits[:n])
        if capped is not None and self.cap_scale is not None:
            torch.ops.aten.tanh_backward.grad_input(logits, capped, grad_input=logits)
            logits.mul_(self.cap_scale)
        if self.grad_bias is not None:
            self.grad_bias += logits[:n].sum(dim=0)
        if self.grad_hidden is not None:
            self.grad_hidden[at] = self._grad_x(logits)[:n]
        if self.grad_weight is not None:
            self._add_grad_weight(logits[:n], self.x[:n])

    def _logits(self) -> Tensor:
        if self.product_dtype != self.dtype:
            logits = torch.mm(self.x, self.weight.T, out_dtype=self.dtype)
            return logits if self.bias is None else logits.add_(self.bias)
        if self.weight.dtype == self.dtype:
            return linear(self.x, self.weight, self.bias)
        logits = self.x.new_empty(len(self.x), len(self.weight))
        for columns, weight in self._cast_weight():
            logits[:, columns] = linear(self.x, weight, None if self.bias is None else self.bias[columns])
        return logits

    def _grad_x(self, grad: Tensor) -> Tensor:
        if self._multiplies_bfloat16():
            return torch.mm(grad.to(self.product_dtype), self.weight, out_dtype=self.dtype)
        if self.weight.dtype == self.dtype:
            return grad @ self.weight
        grad_x = grad.new_zeros(self.x.shape)
        for columns, weight in self._cast_weight():
            grad_x.addmm_(grad[:, columns], weight)
        return grad_x

    def _add_grad_weight(self, grad: Tensor, x: Tensor) -> None:
        assert self.grad_weight is not None
        if self._multiplies_bfloat16():
            torch.addmm(self.grad_weight, grad.T.to(x.dtype), x, out_dtype=self.dtype, out=self.grad_weight)
        else:
            self.grad_weight.addmm_(grad.T, x.to(self.dtype))

    def _multiplies_bfloat16(self) -> bool:
        """Not float16: its range ends where gradients divided by the number of tokens begin."""
        return self.product_dtype == torch.bfloat16

    def _cast_weight(self) -> Iterator[tuple[slice, Tensor]]:
        size = max(1, CAST_ELEMENTS // self.weight.shape[1])
        for start in range(0, len(self.weight), size):
            columns = slice(start, start + size)
            yield columns, self.weight[columns].to(self.dtype)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any tensor is float64, float32 otherwise."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors as HeadChunks.gradients' without their numbers."""
    dtype = compute_dtype(hidden, weight, bias)
    found = [
        hidden.new_empty(0 if x is None or not need else x.shape, dtype=dtype)
        for x, need in zip((hidden, weight, bias), needed, strict=True)
    ]
    return found[0], found[1], found[2]


def used_rows(used: Tensor) -> Tensor | None:
    """Indices of the rows used [N], None for all; None on a GPU, whatever they are."""
    if used.device.type != "cpu" or bool(used.all()):
        return None
    return used.nonzero()[:, 0]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias. oneDNN is up to twice as fast as the library behind F.linear, which sets in fp32 on it."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def row_kernels(implementation: Implementation) -> tuple[Callable[..., Any], Callable[..., None]]:
    """gather_logprobs' passes over rows of logits.

    (logits, ids, temperature, return_entropy, ignore_index) -> logprobs, entropy, stats
    (grad_logprobs, grad_entropy, logits, ids, stats, entropy, temperature, ignore_index) -> None: over the logits
    """
    if implementation == "cpp":
        load_compiled_ops()
        return torch.ops.rlhf_fast._gather_logprobs_forward, torch.ops.rlhf_fast._gather_logprobs_backward_
    from rlhf_fast.kernels import gather_logprobs as kernel  # not at the top: a machine may have no Triton

    return kernel.forward, kernel.backward_
