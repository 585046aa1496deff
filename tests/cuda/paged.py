"""A paged cache and the tokens of a pass in guarded memory, as csrc/cuda/kernels.h describes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.cuda import structures
from tests.cuda.structures import PAGE_TOKENS, TYPES
from tests.cuda_on_cpu.device import Device


@dataclass(frozen=True)
class Layout:
    """Heads side by side in a row of projections, as a model's one or three products leave them.

    `together`: a head's query, key and value lie side by side, as in GPT-NeoX.
    """

    query_heads: int
    key_value_heads: int
    size: int
    together: bool = False

    @property
    def row(self) -> int:
        return (self.query_heads + 2 * self.key_value_heads) * self.size

    def structure(self) -> structures.Heads:
        counts = self.query_heads, self.key_value_heads, self.size
        if self.together:
            return structures.Heads(*counts, 0, self.size, 2 * self.size, 3 * self.size, 3 * self.size)
        keys, values = (n * self.size for n in (self.query_heads, self.query_heads + self.key_value_heads))
        return structures.Heads(*counts, 0, keys, values, self.size, self.size)

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of projections as queries, keys and values [tokens, heads, size]: views of them."""
        if self.together:
            queries, keys, values = rows.unflatten(1, (self.query_heads, 3, self.size)).unbind(2)
            return queries, keys, values
        heads = rows.unflatten(1, (-1, self.size))
        return tuple(heads.split([self.query_heads, self.key_value_heads, self.key_value_heads], dim=1))  # type: ignore


class Pool:
    """Pages for some sequences, handed out in an order that is none; NaN where nobody has written."""

    def __init__(
        self,
        device: Device,
        dtype: torch.dtype,
        layout: Layout,
        lengths: Sequence[int],
        layers: int = 2,
        offset: int = 0,
    ) -> None:
        pages = [(length + PAGE_TOKENS - 1) // PAGE_TOKENS for length in lengths]
        self.max_pages = max(pages) + 1
        numbers = torch.randperm(sum(pages) + 2, generator=torch.Generator().manual_seed(1)).int()
        self.table = torch.full((len(lengths), self.max_pages), -(2**20), dtype=torch.int32)  # no page: never looked at
        for sequence, used in enumerate(numbers[: sum(pages)].split(pages)):
            self.table[sequence, : len(used)] = used
        self.layout, self.layers = layout, layers
        shape = len(numbers), layers, 2, layout.key_value_heads, PAGE_TOKENS, layout.size
        self.memory = device.tensor(torch.full(shape, torch.nan, dtype=dtype), offset)
        self.structure = structures.PagedCache(
            TYPES[dtype], self.memory.data_ptr(), layers, layout.key_value_heads, layout.size
        )

    def written(self, layer: int, sequence: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [length, heads, size] of a sequence's first positions."""
        pages = self.table[sequence, : (length + PAGE_TOKENS - 1) // PAGE_TOKENS].long()
        both = self.memory[pages, layer].permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]
        return both[0], both[1]

    def write(self, layer: int, sequence: int, keys: Tensor, values: Tensor) -> None:
        """Fills the sequence's first positions."""
        for position in range(len(keys)):
            page, slot = self.table[sequence, position // PAGE_TOKENS], position % PAGE_TOKENS
            self.memory[page, layer, 0, :, slot] = keys[position]
            self.memory[page, layer, 1, :, slot] = values[position]


class Tokens:
    """(sequence, position) of each token of a pass; position -1 is padding, whose sequence is not looked at."""

    def __init__(self, device: Device, pool: Pool, places: Sequence[tuple[int, int]]) -> None:
        self.sequence, self.position = torch.tensor(places, dtype=torch.int32).unbind(1)
        self.memory = [device.tensor(part) for part in (self.sequence, self.position, pool.table)]
        pointers = [part.data_ptr() for part in self.memory]
        self.structure = structures.Tokens(*pointers, pool.max_pages, len(places))
