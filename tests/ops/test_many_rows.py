"""More rows than 65,535, where the second and third dimension of a GPU's grid end, and a 16-bit counter."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.ops._loss_rows import cross_entropy_rows_
from tests.ops.op_cases import Normals
from tests.ops.test_fuzz import CASES, run

ROWS = 70_000


def arguments(op: str) -> dict[str, Any]:
    tensors = CASES[op].tensors(Normals(0, torch.float32), ROWS, 1)
    if op not in ("gather_logprobs", "linear_logprobs"):
        tensors["mask"] = torch.arange(ROWS)[:, None] % 7 != 0
    return tensors


@pytest.mark.parametrize("op", CASES)
def test_cpp(op: str) -> None:
    """Against the reference in float64; the last rows count as the first do."""
    tensors = arguments(op)
    options = {name: choices[0] for name, choices in CASES[op].options.items()}
    doubles = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    found, expected = run(op, tensors, options, "cpp"), run(op, doubles, options, "reference")
    for name, exact in expected.items():
        largest = max(float(exact.abs().max()), 1.0)
        torch.testing.assert_close(found[name].double(), exact, rtol=2e-5, atol=2e-5 * largest)


class Recorder:
    """Stands for a Triton kernel and notes its grids."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.grids.append(grid)
        return lambda *_, **__: None


@pytest.mark.parametrize(
    ("op", "kernels"),
    [
        ("gather_logprobs", ["_forward_kernel", "_backward_kernel"]),
        ("logits_ppo_loss", ["_ppo_kernel"]),
        ("gae", ["_kernel"]),
        ("shaped_gae", ["_kernel"]),
    ],
)
def test_triton_has_a_program_a_row(op: str, kernels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the grid's first dimension, the only one that is long enough: 2^31 - 1."""
    module = importlib.import_module(f"rlhf_fast.kernels.{op}")
    recorders = {name: Recorder() for name in kernels}
    for name, recorder in recorders.items():
        monkeypatch.setattr(module, name, recorder)
    run(op, arguments(op), {name: choices[0] for name, choices in CASES[op].options.items()}, "triton")
    assert {name: recorder.grids for name, recorder in recorders.items()} == {name: [(ROWS,)] for name in kernels}


def test_triton_cross_entropy_has_a_program_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr("rlhf_fast.kernels.logits_ppo_loss._cross_entropy_kernel", recorder)
    ids = torch.zeros(ROWS, dtype=torch.int64)
    cross_entropy_rows_("triton", torch.zeros(ROWS, 2), ids, ids == 0, None, torch.tensor(1.0))
    assert recorder.grids == [(ROWS,)]


@pytest.mark.parametrize("op", ["ppo_loss", "value_loss", "masked_whiten"])
def test_triton_grids_of_tokens_have_one_dimension(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"rlhf_fast.kernels.{op}")
    recorders = []
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        recorders.append(Recorder())
        monkeypatch.setattr(module, name, recorders[-1])
    getattr(ops, op)(**arguments(op), backend="triton")
    assert recorders
    for recorder in recorders:
        assert [len(grid) for grid in recorder.grids] == [1]
