"""Every op in C++ against the reference in float64: any shape, dtype, numbers, and place in memory.

Each tensor has a dtype of its own and lies anywhere: its dimensions in any order, with gaps in between, or one row of
it standing for all. What is around it is junk. tests/test_sanitizers.py runs this file too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops import Backend
from tests.ops.op_cases import Normals, poison, seeds

V, H = 19, 5
IGNORE = -100
DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROUNDING = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
JUNK = {torch.bool: True, torch.int64: -7, torch.int32: -7}  # NaN for numbers

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """How an op is called: its tensors, which of them may be left out and which get gradients, its options."""

    tensors: Callable[[Normals, int, int], Tensors]
    options: dict[str, list[Any]]
    optional: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()


def scan_tensors(normal: Normals, rows: int, columns: int) -> Tensors:
    return {name: normal(rows, columns) for name in ("rewards", "values")} | {"last_values": normal(rows)}


def shaped_tensors(normal: Normals, rows: int, columns: int) -> Tensors:
    tokens = {name: normal(rows, columns) for name in ("logprobs", "ref_logprobs", "values")}
    return tokens | {"scores": normal(rows), "last_values": normal(rows)}


def policy_tensors(normal: Normals, rows: int, columns: int) -> Tensors:
    names = ("old_logprobs", "advantages", "ref_logprobs", "weights")
    return {name: normal(rows, columns) - float("logprobs" in name) for name in names}


def loss_tensors(normal: Normals, rows: int, columns: int) -> Tensors:
    found = {name: normal(rows, columns) for name in ("logprobs", "entropy")}
    return found | policy_tensors(normal, rows, columns)


def value_tensors(normal: Normals, rows: int, columns: int) -> Tensors:
    return {name: normal(rows, columns) for name in ("values", "old_values", "returns")}


def logits_tensors(normal: Normals, rows: int, columns: int) -> Tensors:
    return {"logits": 5 * normal(rows, columns, V), "ids": integers(normal, rows, columns)}


def head_tensors(normal: Normals, rows: int, columns: int) -> Tensors:
    head = {"hidden": normal(rows, columns, H), "weight": normal(V, H), "bias": normal(V)}
    return head | {"ids": integers(normal, rows, columns)}


def integers(normal: Normals, *shape: int) -> Tensor:
    return torch.randint(V, shape, generator=normal.generator)


def both(*parts: Callable[..., Tensors]) -> Callable[..., Tensors]:
    return lambda *arguments: {name: x for part in parts for name, x in part(*arguments).items()}


TEMPERATURE = {"temperature": [1.0, 0.5, 2.0]}
HEAD = {"softcap": [None, 2.0], "scale": [1.0, 0.3]}
POLICY = {
    "cliprange": [0.2, 0.0],
    "cliprange_high": [None, 0.3],
    "dual_clip": [None, 1.5],
    "kl_coef": [0.0, 0.1],
    "kl_estimator": ["k2", "k3"],
    "num_tokens": [None, 7],
}
ENTROPY = {"entropy_coef": [0.0, 0.1]}
SCAN = {"gamma": [1.0, 0.9], "lam": [0.95, 0.0, 1.0]}
SHAPING = {"kl_coef": [0.0, 0.1], "kl_estimator": ["k1", "k2", "k3"], "clip_score": [None, 0.5]}
POLICY_OPTIONAL = ("ref_logprobs", "weights")
HEAD_LEAVES = ("hidden", "weight", "bias")

CASES = {
    "gather_logprobs": Case(
        logits_tensors, TEMPERATURE | {"return_entropy": [True], "inplace_backward": [False, True]}, leaves=("logits",)
    ),
    "linear_logprobs": Case(head_tensors, TEMPERATURE | HEAD | {"return_entropy": [True]}, ("bias",), HEAD_LEAVES),
    "linear_cross_entropy": Case(
        both(head_tensors, lambda n, *shape: {"weights": n(*shape)}), HEAD, ("bias", "weights"), HEAD_LEAVES
    ),
    "gae": Case(scan_tensors, SCAN, ("last_values",)),
    "shaped_gae": Case(shaped_tensors, SCAN | SHAPING, ("last_values",)),
    "masked_whiten": Case(lambda n, *shape: {"x": n(*shape)}, {"shift_mean": [True, False], "eps": [0.1]}),
    "value_loss": Case(value_tensors, {"cliprange_value": [0.2, None, 0.0], "num_tokens": [None, 7]}, (), ("values",)),
    "ppo_loss": Case(loss_tensors, POLICY | ENTROPY, POLICY_OPTIONAL, ("logprobs", "entropy")),
    "logits_ppo_loss": Case(
        both(logits_tensors, policy_tensors), POLICY | ENTROPY | TEMPERATURE, POLICY_OPTIONAL, ("logits",)
    ),
    "linear_ppo_loss": Case(
        both(head_tensors, policy_tensors),
        POLICY | ENTROPY | TEMPERATURE | HEAD,
        ("bias", *POLICY_OPTIONAL),
        HEAD_LEAVES,
    ),
}


def elsewhere(data: st.DataObject, x: Tensor) -> Tensor:
    """The same numbers in other memory; or the first row's for all rows, which are then one row of memory."""
    can_be_shared = x.is_floating_point() and x.dim() > 1 and len(x) > 1 and not bool(x[:1].isnan().any())
    shared = can_be_shared and data.draw(st.booleans())
    numbers = x[:1] if shared else x
    order = data.draw(st.permutations(range(x.dim())))
    places = [(data.draw(st.integers(0, 2)), data.draw(st.integers(1, 2)), numbers.shape[d]) for d in order]
    memory = torch.full(
        [first + step * size for first, step, size in places], JUNK.get(x.dtype, math.nan), dtype=x.dtype
    )
    view = memory[tuple(slice(first, first + step * size, step) for first, step, size in places)]
    view = view.permute([order.index(d) for d in range(x.dim())])
    view.copy_(numbers)
    return view.expand_as(x)


def draw(op: str, data: st.DataObject, seed: int) -> tuple[Tensors, dict[str, Any], Tensor]:
    """Tensors, NaN outside the mask, options, and the mask, which some ops take as ids to be ignored."""
    case, normal = CASES[op], Normals(seed)
    rows, columns = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 9))
    tensors = case.tensors(normal, rows, columns)
    options = {name: data.draw(st.sampled_from(choices)) for name, choices in case.options.items()}
    for name in case.optional:
        if data.draw(st.booleans()):
            del tensors[name]
    if "ref_logprobs" not in tensors and "kl_coef" in options:
        options["kl_coef"] = 0.0
    mask = normal(rows, columns) > data.draw(st.sampled_from([-9.0, -0.5, 9.0]))  # all, most, none
    for name, x in tensors.items():
        if name == "ids":
            tensors[name] = torch.where(mask, x, IGNORE).to(data.draw(st.sampled_from([torch.int64, torch.int32])))
            continue
        if x.shape[:2] == mask.shape:
            x = poison(x, mask if x.dim() == 2 else mask[..., None])
        tensors[name] = x.to(data.draw(st.sampled_from(DTYPES)))
    if op not in ("gather_logprobs", "linear_logprobs"):
        tensors["mask"] = mask
    return tensors, options, mask


def run(op: str, tensors: Tensors, options: dict[str, Any], backend: Backend) -> Tensors:
    """All that comes out, and the gradients of a mixture of it."""
    leaves = {name: tensors[name].detach().requires_grad_() for name in CASES[op].leaves if name in tensors}
    found = getattr(ops, op)(**tensors | leaves, **options, backend=backend)
    outputs = {}
    for i, output in enumerate(found if isinstance(found, tuple) else (found,)):
        outputs |= output if isinstance(output, dict) else {} if output is None else {str(i): output}
    wanting = [x for x in outputs.values() if x.requires_grad]
    upstream = [torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).reshape(x.shape) for x in wanting]
    gradients = torch.autograd.grad(wanting, list(leaves.values()), upstream) if leaves else ()
    outputs = {name: x.detach() for name, x in outputs.items()}
    return outputs | {f"grad_{name}": x for name, x in zip(leaves, gradients, strict=True)}


@pytest.mark.parametrize("op", CASES)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), seed=seeds)
def test_any_tensors_cpp(op: str, data: st.DataObject, seed: int) -> None:
    tensors, options, mask = draw(op, data, seed)
    tensors = {name: elsewhere(data, x) for name, x in tensors.items()}
    doubles = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    expected, found = run(op, doubles, options, "reference"), run(op, tensors, options, "cpp")
    assert found.keys() == expected.keys()
    exactly = all(x.dtype == torch.float64 for x in tensors.values() if x.is_floating_point())
    for name, exact in expected.items():
        tolerance = max(1e-10 if exactly else 2e-5, ROUNDING.get(found[name].dtype, 0.0))
        largest = float(exact.abs().max()) if exact.numel() else 0.0
        torch.testing.assert_close(
            found[name].double(),
            exact,
            rtol=tolerance,
            atol=tolerance * max(largest, 1.0),
            msg=lambda m, n=name: f"{n}: {m}",
        )
        if exact.shape[:2] == mask.shape:
            assert bool((found[name][~mask] == 0).all()), name


# Ops of which each row of the outputs comes from that row of the inputs.
BY_ROWS = [op for op in CASES if op != "masked_whiten"]
SHARED = ("weight", "bias")
BAD = [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45]


@pytest.mark.parametrize("op", BY_ROWS)
@settings(max_examples=15, deadline=None)
@given(data=st.data(), seed=seeds)
def test_numbers_that_are_none_stay_in_their_row_cpp(op: str, data: st.DataObject, seed: int) -> None:
    """NaN, infinities, numbers at the ends of their type: other rows keep their bits."""
    tensors, options, mask = draw(op, data, seed)
    rows = len(mask)
    row = data.draw(st.integers(0, max(rows - 1, 0)))
    others = torch.arange(rows) != row
    bad = {
        n: with_bad_numbers(data, x, row) if x.is_floating_point() and n not in SHARED else x
        for n, x in tensors.items()
    }
    clean, found = run(op, tensors, options, "cpp"), run(op, bad, options, "cpp")
    for name, x in clean.items():
        if x.shape[:1] == (rows,) and name.removeprefix("grad_") not in SHARED:
            assert torch.equal(found[name][others], x[others]), name


def with_bad_numbers(data: st.DataObject, x: Tensor, row: int) -> Tensor:
    x = x.clone()
    numbers = x[row : row + 1].view(-1)
    if len(numbers):
        for _ in range(data.draw(st.integers(0, 2))):
            numbers[data.draw(st.integers(0, len(numbers) - 1))] = data.draw(st.sampled_from(BAD))
    return x
