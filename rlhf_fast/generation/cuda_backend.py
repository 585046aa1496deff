"""Decoding on a GPU: the C++ step loop with csrc/cuda's kernels, on the model's own parameters where they lie."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from rlhf_fast.build import load_generation
from rlhf_fast.build_cuda import architecture_of, load_cuda

from .cuda_graphs import CudaGraphs
from .decoded import Decoded, Request
from .loop import Counts, complete
from .model_spec import Spec, UnsupportedError
from .params import SamplingParams

DEVICE = "cuda"  # the kind of device that models lie on; the tests run everything but the graphs on the CPU
PAGE_TOKENS = 16  # as csrc/cuda/kernels.h
PREFILL_TOKENS = 2048  # of prompts in one step: enough for the products' best rate
SHARE_OF_FREE_MEMORY = 0.9  # that the cache may take where no budget is given


def decode(
    spec: Spec,
    prompts: Sequence[Sequence[int]],
    requests: Sequence[Request],
    params: SamplingParams,
    *,
    max_batch_size: int,
    cache_bytes: int | None,
    **options: Any,
) -> tuple[Decoded, Counts]:
    """As loop.complete. All memory is given back to PyTorch at the end."""
    rows = min(max_batch_size, len(requests))
    lengths = [len(prompts[request.prompt]) + request.limit for request in requests]
    prefill_tokens = min(PREFILL_TOKENS, sum(map(len, prompts)) + rows)
    device = _weight(spec).device
    with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        host = _Host(spec, device)
        settings = load_generation().CudaSettings()
        settings.max_rows, settings.max_positions = rows, max(lengths)
        settings.max_tokens = rows + prefill_tokens
        settings.penalty = params.repetition_penalty != 1
        settings.allocate, settings.product, settings.attend = host.allocate, host.product, host.attend
        if device.type == "cuda":
            settings.stream = torch.cuda.current_stream().cuda_stream
            settings.replay = CudaGraphs().replay
        budget = cache_bytes if cache_bytes is not None else _memory_for_cache(device)
        wanted = sum(sorted((-(-length // PAGE_TOKENS) for length in lengths), reverse=True)[:rows])
        host.take_pool(min(wanted, budget // host.page_bytes))
        settings.pool, settings.pages = host.pool.data_ptr(), host.pool.shape[0]
        backend = load_generation().cuda_backend(library_for(device), spec.model, settings)
        decoded, counts = complete(
            backend,
            prompts,
            requests,
            params,
            max_batch_size=max_batch_size,
            cache_bytes=budget,
            prefill_tokens=prefill_tokens,
            **options,
        )
    for name in ("tokens", "mask", "logprobs", "sampled_logprobs"):
        setattr(decoded, name, getattr(decoded, name).to(device))
    return decoded, counts


def check(spec: Spec, device: torch.device) -> None:
    """Raises UnsupportedError: weights of several types, which only the CPU's decoder takes. BuildError: no library."""
    dtypes = {layer.weight.dtype for layer in spec.linears.values()}
    if len(dtypes) > 1:
        names = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise UnsupportedError(f"weights of several types: {', '.join(names)}")
    library_for(device)


def library_for(device: torch.device) -> int:
    """The address of what makes the C++ decoder's backend, built for that GPU at need. Raises BuildError."""
    return load_cuda(architecture_of(device))


class _Host:
    """PyTorch as csrc/generation/cuda/torch.h wants it: memory by address, products and attention on that memory."""

    def __init__(self, spec: Spec, device: torch.device):
        self.linears, self.device = spec.linears, device
        self.heads, self.layers = spec.model.heads, spec.model.layers
        self.dtype = _weight(spec).dtype
        self.page = (len(self.layers), 2, self.heads.key_value_heads, PAGE_TOKENS, self.heads.size)
        self.page_bytes = torch.Size(self.page).numel() * self.dtype.itemsize
        self.memory: list[Tensor] = []
        self.pool = torch.empty(0)

    def take_pool(self, pages: int) -> None:
        """The cache: [pages, layers, keys and values, heads, PAGE_TOKENS, head size]."""
        self.pool = torch.empty(pages, *self.page, dtype=self.dtype, device=self.device)

    def allocate(self, size: int, on_host: bool) -> int:
        pinned = on_host and self.device.type == "cuda"
        device = torch.device("cpu") if on_host else self.device
        self.memory.append(torch.zeros(size, dtype=torch.uint8, device=device, pin_memory=pinned))
        return self.memory[-1].data_ptr()

    def product(self, weight: int, x: int, rows: int, x_row: int, y: int, y_row: int, float32: bool) -> None:
        layer = self.linears[weight]
        numbers = self._at(x, self.dtype, (rows, x_row), (x_row, 1))
        result = _unrounded(layer, numbers) if float32 and self.dtype != torch.float32 else layer(numbers)
        self._at(y, result.dtype, tuple(result.shape), (y_row, 1)).copy_(result)

    def attend(
        self, layer: int, position: int, count: int, pages: int, projected: int, projected_row: int, out: int
    ) -> None:
        heads, end = self.heads, position + count
        numbers = self._at(pages, torch.int32, (-(-end // PAGE_TOKENS),), (1,))
        cached = self.pool[:, layer].index_select(0, numbers)  # [pages, 2, heads, PAGE_TOKENS, size]
        keys, values = cached.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, None, :, :end]
        queries = self._at(
            projected + heads.queries * self.dtype.itemsize,
            self.dtype,
            (1, heads.query_heads, count, heads.size),
            (0, heads.query_stride, projected_row, 1),
        )
        result = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            _visible(count, end, self.layers[layer].window, self.device),
            scale=self.layers[layer].attention_scale,
            enable_gqa=heads.query_heads != heads.key_value_heads,
        )
        size = heads.query_heads * heads.size
        self._at(out, self.dtype, tuple(result.shape), (0, heads.size, size, 1)).copy_(result)

    def _at(self, address: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        """Numbers in this memory as a tensor."""
        for memory in self.memory:
            offset = address - memory.data_ptr()
            if 0 <= offset < memory.numel():
                return memory.view(dtype).as_strided(shape, strides, offset // dtype.itemsize)
        raise ValueError("an address outside of the decoder's memory")


def _weight(spec: Spec) -> Tensor:
    weight: Any = next(iter(spec.linears.values())).weight
    return weight


def _visible(count: int, end: int, window: int, device: torch.device) -> Any:
    """Which of `end` positions the last `count` of them see."""
    if not 0 < window < end:
        return causal_lower_right(count, end)
    queries, keys = torch.arange(end - count, end, device=device)[:, None], torch.arange(end, device=device)
    return (keys <= queries) & (keys > queries - window)


def _unrounded(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's output in float32 from half-precision numbers."""
    weight: Any = layer.weight
    bias: Any = layer.bias
    if x.device.type == "cpu":
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    product = torch.mm(x, weight.t(), out_dtype=torch.float32)
    return product if bias is None else product + bias


def _memory_for_cache(device: torch.device) -> int:
    """Bytes that the cache may take where no budget is given: free ones, and those that PyTorch holds unused."""
    if device.type == "cpu":
        return 2**40
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(SHARE_OF_FREE_MEMORY * (torch.cuda.mem_get_info(device)[0] + unused))
