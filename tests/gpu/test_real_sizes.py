"""csrc/cuda's kernels at the sizes of real models, in the GPU's memory, against PyTorch in float64 or float32."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.generation import SamplingParams
from rlhf_fast.generation.sampler import Sampler
from tests.cuda import structures
from tests.cuda.structures import PAGE_TOKENS, TYPES, Activation, NormKind, pointer
from tests.cuda_on_cpu.device import Kernels
from tests.gpu.device import Device

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Device().load("all")


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return (scale * torch.randn(*shape, generator=generator, device="cuda")).to(dtype)


def zeros(size: int) -> Tensor:
    return torch.zeros(max(size, 16), dtype=torch.uint8, device="cuda")


def layer_of(weight: Tensor, transposed: bool = False) -> structures.Linear:
    size_out, size_in = weight.shape[::-1] if transposed else weight.shape
    return structures.Linear(
        weight.data_ptr(), TYPES[weight.dtype], size_out, size_in, weight.stride(0), transposed, None
    )


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize(("size_in", "size_out"), [(2048, 8192), (8192, 2048), (4096, 128256)])
def test_linear(kernels: Kernels, dtype: torch.dtype, rows: int, size_in: int, size_out: int) -> None:
    weight, x = randn(size_out, size_in, dtype=dtype, scale=size_in**-0.5), randn(rows, size_in, dtype=dtype)
    y = torch.full((rows, size_out), torch.nan, device="cuda")
    layer = layer_of(weight)
    workspace = zeros(kernels.linear_workspace(layer))
    for _ in range(2):  # the second finds what the first left in the workspace
        kernels.linear(layer, x, rows, size_in, TYPES[torch.float32], y, size_out, workspace, 0)
        torch.testing.assert_close(y.double(), x.double() @ weight.double().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_row_of_linear_does_not_depend_on_the_others(kernels: Kernels, dtype: torch.dtype) -> None:
    weight, x = randn(2048, 8192, dtype=dtype, scale=0.01), randn(16, 8192, dtype=dtype)
    layer, found = layer_of(weight), []
    workspace = zeros(kernels.linear_workspace(layer))
    for rows in (1, 3, 8, 16):
        y = torch.empty(rows, 2048, dtype=dtype, device="cuda")
        kernels.linear(layer, x, rows, 8192, TYPES[dtype], y, 2048, workspace, 0)
        found.append(y[0].clone())
    assert all(torch.equal(row, found[0]) for row in found)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gated_mlp_in(kernels: Kernels, dtype: torch.dtype) -> None:
    gate, value = randn(8192, 2048, dtype=dtype, scale=0.03), randn(8192, 2048, dtype=dtype, scale=0.031)
    x, inner = randn(4, 2048, dtype=dtype), torch.empty(4, 8192, dtype=dtype, device="cuda")
    kernels.gated_mlp_in(layer_of(gate), layer_of(value), int(Activation.SILU), x, 4, 2048, inner, 8192, 0)
    expected = F.silu(F.linear(x.float(), gate.float()).to(dtype)) * F.linear(x.float(), value.float()).to(dtype)
    torch.testing.assert_close(inner, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("window", [0, 1000])
def test_attention(kernels: Kernels, dtype: torch.dtype, size: int, window: int) -> None:
    """Decoding: a token of each of three sequences, one of them 4,096 positions long."""
    lengths, query_heads, heads = [4096, 37, 1000], 32, 8
    pages = [-(-length // PAGE_TOKENS) for length in lengths]
    order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(0)).int()
    table = torch.zeros(3, max(pages), dtype=torch.int32)
    for row, numbers in enumerate(order.split(pages)):
        table[row, : pages[row]] = numbers
    table = table.cuda()
    pool = randn(sum(pages), 1, 2, heads, PAGE_TOKENS, size, dtype=dtype)
    row = (query_heads + 2 * heads) * size
    projected = randn(3, row, dtype=dtype)
    sequence = torch.arange(3, dtype=torch.int32, device="cuda")
    position = torch.tensor(lengths, dtype=torch.int32, device="cuda") - 1
    tokens = structures.Tokens(sequence.data_ptr(), position.data_ptr(), table.data_ptr(), max(pages), 3)
    cache = structures.PagedCache(TYPES[dtype], pool.data_ptr(), 1, heads, size)
    shape = structures.Heads(query_heads, heads, size, 0, query_heads * size, (query_heads + heads) * size, size, size)
    out = torch.full((3, query_heads * size), torch.nan, dtype=dtype, device="cuda")
    workspace = zeros(kernels.attention_workspace(shape, 3, 4096))
    kernels.attention(cache, 0, shape, size**-0.5, 0.0, window, tokens, projected, row, out, workspace, 4096, 0)
    for i, length in enumerate(lengths):
        cached = pool[table[i, : pages[i]].long(), 0].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length].float()
        first = max(0, length - window) if window else 0
        queries = projected[i, : query_heads * size].view(1, query_heads, 1, size).float()
        expected = F.scaled_dot_product_attention(
            queries, cached[0, None, :, first:], cached[1, None, :, first:], enable_gqa=True
        )
        torch.testing.assert_close(out[i].float(), expected.flatten(), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_add_norm(kernels: Kernels, dtype: torch.dtype) -> None:
    x, residual, weight = (
        randn(64, 4096, dtype=dtype),
        randn(64, 4096, dtype=dtype, scale=2),
        randn(4096, dtype=torch.float32),
    )
    y, expected = torch.empty_like(x), residual + x
    norm = structures.Norm(int(NormKind.RMS), weight.data_ptr(), None, 1e-5, True)
    kernels.add_norm(TYPES[dtype], structures.Norm(), x, 1.0, residual, norm, y, 64, 4096, 0)
    assert torch.equal(residual, expected)
    wide = expected.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(dtype).float() * weight
    torch.testing.assert_close(y.float(), normed.to(dtype).float(), rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.05}, {"temperature": 0.0}], ids=str)
def test_sample(kernels: Kernels, options: dict[str, float]) -> None:
    """The tokens of the Python sampler from the same logits, a vocabulary of 128,256."""
    rows, vocabulary = 16, 128_256
    logits = randn(rows, vocabulary, dtype=torch.float32, scale=3)
    params = SamplingParams(max_tokens=4, **options)  # type: ignore[arg-type]
    sampler = Sampler(params, [[0]] * rows, [7] * rows, list(range(rows)), torch.tensor([], dtype=torch.int64))
    expected, logprobs, sampled_logprobs = sampler(logits.cpu(), 0)
    given = structures.SamplingOptions(
        params.temperature, params.top_p, params.min_p, params.repetition_penalty, params.top_k, 0, None, 0
    )
    seeds = torch.full((rows,), 7, dtype=torch.int64, device="cuda")
    samples = torch.arange(rows, dtype=torch.int32, device="cuda")
    positions, tokens = torch.zeros(2, rows, dtype=torch.int32, device="cuda")
    found = torch.full((2, rows), torch.nan, device="cuda")
    arrays = [seeds, samples, positions, None, tokens, found[0], found[1]]
    sampling = structures.Sampling(*map(pointer, arrays))
    workspace = zeros(kernels.sample_workspace(rows, vocabulary))
    kernels.sample(logits, rows, vocabulary, ctypes.c_float(1), ctypes.c_float(0), given, sampling, workspace, 0)
    assert (tokens.cpu() == expected).float().mean() >= 15 / 16  # rounding may move the border between two
    same = tokens.cpu() == expected
    torch.testing.assert_close(found[0].cpu()[same], logprobs[same], rtol=0, atol=1e-4)
    torch.testing.assert_close(found[1].cpu()[same], sampled_logprobs[same], rtol=0, atol=1e-4)
