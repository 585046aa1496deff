"""A language-model head a few rows at a time: logits that are never in memory as a whole, and the head's gradients.

The products are PyTorch's libraries', the fastest there are. What becomes of a chunk's logits is the row kernels' work,
in place: they leave the gradient of the loss where the logits were, and two more products take it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from rlhf_fast.ops.reference._common import compute_dtype

# Rows whose logits exist at once. More rows share what a chunk costs, a pass over the weight in two products and over
# its gradient in the third; fewer rows take less memory. On a CPU 64 rows are near the full rate, and 3% of the logits
# of 2048 tokens; a GPU needs more to be kept busy. It is always that number, the last chunk filled up with rows that
# nobody reads: a product of another shape may add in another order, and then a row would depend on how many there are.
CHUNK_ROWS = {"cpu": 64, "cuda": 512}

# A half-precision weight is cast on a CPU as it is used, so many elements at a time (4 MB in fp32), again in each
# chunk: the products take a seventh longer, and a whole copy in fp32 would be a third of the logits of 2048 tokens.
CAST_ELEMENTS = 2**20

# oneDNN's product makes a tensor of its own, which is copied into the buffer: so many logits at a time (4 MB).
PRODUCT_ELEMENTS = 2**20

Rows = slice | Tensor  # which of the N rows: Tensor for indices

# What is done with the logits [n, V] of some rows, in place: d loss / d logits, unless no gradient is needed.
RowKernel = Callable[[Rows, Tensor], None]


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
        gradients: Sequence[bool] = (False, False, False),
    ) -> None:
        """hidden [..., H], weight [V, H], bias [V], used [...] bool; gradients: which of the first three need one."""
        self.dtype = compute_dtype(hidden, weight, bias)
        self.hidden, self.weight = hidden.reshape(-1, hidden.shape[-1]), weight
        self.bias = None if bias is None else bias.to(self.dtype)
        self.cap_scale = None if softcap is None else scale / softcap
        self.temperature = temperature / (scale if softcap is None else softcap)
        self.used = used.reshape(-1)
        self.index = used_rows(self.used)

        # Tensor cores multiply half-precision numbers as they are, and add in fp32.
        half = hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16)
        self.product_dtype = hidden.dtype if half else self.dtype
        self.x = hidden.new_zeros(CHUNK_ROWS[hidden.device.type], hidden.shape[-1], dtype=self.product_dtype)
        self.buffer = hidden.new_empty(len(self.x), len(weight), dtype=self.dtype)
        self.grad_hidden, self.grad_weight, self.grad_bias = (
            x.new_zeros(x.shape, dtype=self.dtype) if x is not None and needed else None
            for x, needed in zip((hidden, weight, bias), gradients, strict=True)
        )

    def run(self, kernel: RowKernel) -> None:
        """All chunks, one after the other; the gradients that are needed are added up."""
        size = len(self.x)
        count = len(self.used if self.index is None else self.index)
        with torch.autocast(self.x.device.type, enabled=False):
            for start in range(0, count, size):
                end = min(start + size, count)
                rows = slice(start, end) if self.index is None else self.index[start:end]
                self._run(kernel, rows, end - start)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden, weight and bias, in fp32 (float64); [0] where none is needed."""
        found = [
            self.x.new_empty(0, dtype=self.dtype) if x is None else x
            for x in (self.grad_hidden, self.grad_weight, self.grad_bias)
        ]
        return found[0], found[1], found[2]

    def _run(self, kernel: RowKernel, rows: Rows, n: int) -> None:
        self.x[:n] = torch.where(self.used[rows, None], self.hidden[rows], 0)
        logits = self.buffer
        self._multiply()
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
            self.grad_hidden.view(self.hidden.shape)[rows] = self._grad_x(logits)[:n]
        if self.grad_weight is not None:
            self._add_grad_weight(logits[:n], self.x[:n])

    def _multiply(self) -> None:
        """x @ weight.T + bias, into the buffer."""
        if self.product_dtype != self.dtype:
            torch.mm(self.x, self.weight.T, out_dtype=self.dtype, out=self.buffer)
        elif self.weight.dtype == self.dtype:
            product(self.x, self.weight, self.buffer)
        else:
            for columns, weight in self._cast_weight():
                product(self.x, weight, self.buffer[:, columns])
        if self.bias is not None:
            self.buffer += self.bias

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


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]
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


def product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x @ weight.T. In fp32 on a CPU oneDNN is up to twice as fast as what torch.mm calls."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        torch.mm(x, weight.T, out=out)
        return
    size = max(1, PRODUCT_ELEMENTS // len(x))
    for start in range(0, len(weight), size):
        columns = slice(start, start + size)
        out[:, columns] = torch.ops.mkldnn._linear_pointwise(x, weight[columns], None, "none", [], "")


def with_gradients(loss: Tensor, inputs: Sequence[Tensor | None], gradients: Sequence[Tensor]) -> Tensor:
    """loss, with HeadChunks.gradients' as its gradients with respect to hidden, weight and bias."""
    known = [(x, g) for x, g in zip(inputs, gradients, strict=True) if x is not None and x.requires_grad]
    if not (known and torch.is_grad_enabled()):
        return loss
    traced = torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or type(gradients[0]) is not Tensor
    return KnownGradients.apply(loss, not traced, *(x for pair in known for x in pair))


class KnownGradients(torch.autograd.Function):
    """loss, whose gradients are known: the backward pass hands them on, times the loss's own gradient.

    As they are where that is 1. Otherwise they are scaled in place, for one is as large as the weight; that can be done
    once, and a second backward pass is an error. While a graph is traced nothing may change behind the tracer's back.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, in_place: bool, *inputs_and_gradients: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs_and_gradients[1::2])
        ctx.dtypes = [x.dtype for x in inputs_and_gradients[::2]]
        ctx.in_place = in_place
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        if not ctx.in_place:
            gradients = [gradient * grad_loss for gradient in gradients]
        elif grad_loss.is_cuda or grad_loss.item() != 1:
            for gradient in gradients:
                gradient.mul_(grad_loss)
        # In the inputs' dtype only now: scaled, small gradients are within float16's range.
        cast = [gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return (None, None, *(x for gradient in cast for x in (gradient, None)))
