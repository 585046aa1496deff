"""All products of one decode step: every weight of a small Llama once, for a batch of 1, 16 and 64 rows, on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast.build import load_generation

ROUNDS = 5


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes; `kv` is the width of its keys, and of its values."""

    hidden: int
    kv: int
    intermediate: int
    layers: int
    vocabulary: int

    def weights(self, dtype: torch.dtype) -> list[Tensor]:
        hidden, kv, intermediate = self.hidden, self.kv, self.intermediate
        attention = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
        mlp = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
        shapes = [*(attention + mlp) * self.layers, (self.vocabulary, hidden)]
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


SHAPES = {
    "15M": Shape(288, 288, 768, 6, 32_000),
    "110M": Shape(768, 768, 2048, 12, 32_000),
    "SmolLM2-135M": Shape(576, 192, 1536, 30, 49_152),
}


def ours(x: Tensor, weight: Tensor) -> Tensor:
    module = load_generation()
    y = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    module.linear(
        weight=weight.data_ptr(),
        type=getattr(module.WeightType, str(weight.dtype).removeprefix("torch.")),
        out=weight.shape[0],
        **{"in": weight.shape[1]},
        row_stride=weight.stride(0),
        transposed=False,
        bias=0,
        x=x.data_ptr(),
        rows=x.shape[0],
        x_stride=x.stride(0),
        y=y.data_ptr(),
        y_stride=y.stride(0),
    )
    return y


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """oneDNN's product on plain weights, as torch.compile calls it."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rlhf_fast": ours,
    "F.linear": torch.nn.functional.linear,
    "W @ x^T": lambda x, weight: (weight @ x.T).T,
    "oneDNN's linear": pointwise,
}


@functools.lru_cache(maxsize=1)  # the largest take half a gigabyte
def model(name: str, dtype: torch.dtype) -> list[Tensor]:
    return SHAPES[name].weights(dtype)


def has_bfloat16_products() -> bool:
    """oneDNN has none for a CPU of AVX2."""
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*PRODUCTS, "floor: one read of the weights"])
def test_decode_step(benchmark: Any, name: str, shape: str, rows: int, dtype: torch.dtype) -> None:
    if name == "oneDNN's linear" and dtype == torch.bfloat16 and not has_bfloat16_products():
        return
    benchmark.group = f"products of a decode step, {shape} {str(dtype).removeprefix('torch.')}, batch {rows}"
    benchmark.param = name
    weights = model(shape, dtype)
    benchmark.extra_info["bytes"] = sum(weight.nbytes for weight in weights)
    inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1]).to(dtype) for weight in weights}
    if name == "rlhf_fast":
        inputs = {size: x.float() for size, x in inputs.items()}
    product = PRODUCTS.get(name, lambda x, weight: weight.view(torch.int32).sum(dtype=torch.int32))

    def step() -> None:
        for weight in weights:
            product(inputs[weight.shape[1]], weight)

    with torch.no_grad():
        if name in PRODUCTS:
            x, weight = inputs[weights[0].shape[1]], weights[0]
            expected = x.double() @ weight.double().T
            torch.testing.assert_close(
                product(x, weight).double(), expected, rtol=0.01, atol=0.5 if dtype == torch.bfloat16 else 1e-4
            )
        benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=1)
