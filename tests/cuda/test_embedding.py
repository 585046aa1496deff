"""embed: rows of a table, scaled, with or without learned positions."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.reference.embedding import embed
from tests.cuda.structures import TYPES, Tokens
from tests.cuda_on_cpu.device import Device

VOCABULARY, LONGEST = 11, 9
IDS = torch.tensor([3, 10, 0, 3, -1, 7], dtype=torch.int32)
POSITION = torch.tensor([0, 8, 4, 1, -1, 2], dtype=torch.int32)  # the fifth token is padding, its id is not looked at


def run(
    device: Device,
    dtype: torch.dtype,
    size: int,
    *,
    row_stride: int | None = None,
    learned: bool = False,
    offset: int = 0,
) -> None:
    """The kernel and the reference on the same numbers. `offset`: of all tables and rows from 16-byte alignment."""
    generator = torch.Generator().manual_seed(size)
    stride = row_stride or size
    table = torch.randn(VOCABULARY, stride, generator=generator).to(dtype)
    positions = torch.randn(LONGEST + 2, size, generator=generator).to(dtype) if learned else None
    place = {name: device.tensor(x) for name, x in (("ids", IDS), ("position", POSITION))}
    tokens = Tokens(None, place["position"].data_ptr(), None, 0, len(IDS))
    x = device.empty(len(IDS), size, dtype=dtype, offset=offset)
    device.load("embedding.cu").embed(
        TYPES[dtype],
        device.tensor(table, offset),
        stride,
        1.7,
        place["ids"],
        tokens,
        None if positions is None else device.tensor(positions, offset),
        size,
        2,
        x,
        size,
        None,
    )
    assert torch.equal(x, embed(table[:, :size], 1.7, IDS, POSITION, positions, 2))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [1, 7, 8, 264, 1032])
@pytest.mark.parametrize("learned", [False, True])
def test_rows(device: Device, dtype: torch.dtype, size: int, learned: bool) -> None:
    run(device, dtype, size, learned=learned)


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_that_are_not_aligned(device: Device, dtype: torch.dtype) -> None:
    run(device, dtype, 40, learned=True, offset=4)
    run(device, dtype, 40, row_stride=41)
    run(device, dtype, 40, row_stride=48)
