"""logits_ppo_loss in C++ and in Triton against the reference in float64: what fast code and writing in place get wrong.

Triton runs on CPU tensors here, by its interpreter (tests/conftest.py). The C++ kernels of the instruction sets that
this CPU would not choose run in a process of their own, at the end.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.kernels._rows import rows_are_disjoint
from rlhf_fast.ops import Backend
from rlhf_fast.ops._dispatch import Implementation, load_compiled_ops
from rlhf_fast.ops._loss_rows import cross_entropy_rows_, ppo_rows_, ppo_summary
from tests.ops.op_cases import Normals, close, masks, seeds
from tests.ops.test_gather_logprobs_backends import DTYPES, ROUNDING, VIEWS, flat, likely_ids, make

BACKENDS: list[Implementation] = ["cpp", "triton"]
backends = pytest.mark.parametrize("backend", BACKENDS)

# numpy's remarks on inf - inf in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ALL: dict[str, Any] = {
    "cliprange": 0.1,
    "cliprange_high": 0.3,
    "dual_clip": 1.5,
    "kl_coef": 0.2,
    "kl_estimator": "k3",
    "entropy_coef": 0.05,
    "num_tokens": 13,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "clip higher": {"cliprange": 0.1, "cliprange_high": 0.5},
    "dual clip": {"dual_clip": 1.2, "cliprange": 0.05},
    "k2": {"kl_coef": 0.3, "kl_estimator": "k2"},
    "k3": {"kl_coef": 0.3, "kl_estimator": "k3"},
    "entropy": {"entropy_coef": 0.2},
    "negative entropy": {"entropy_coef": -0.2},
    "num_tokens": {"num_tokens": 5.5},
    "num_tokens as a tensor": {"num_tokens": torch.tensor([7])},
    "temperature": {"temperature": 0.7, "entropy_coef": 0.1},
    "all": ALL,
}


def tokens(logits: Tensor, ids: Tensor, *, seed: int = 0, temperature: float = 1.0) -> dict[str, Any]:
    """Per-token arguments: log-ratios of about 0.3, so that all branches of the clipping are taken; a masked token."""
    normals = Normals(seed)
    with torch.no_grad():
        logprobs = ops.reference.gather_logprobs(logits.double(), ids, temperature=temperature)
        mask = normals(*ids.shape) > -1
    return {
        "ids": ids,
        "old_logprobs": (logprobs + 0.3 * normals(*ids.shape)).float(),
        "advantages": normals(*ids.shape).float(),
        "mask": mask,
        "ref_logprobs": (logprobs + 0.3 * normals(*ids.shape)).float(),
        "weights": normals(*ids.shape).abs().float(),
    }


def doubles(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in arguments.items()}


def from_a_head(logits: Tensor) -> Tensor:
    """A copy that is nobody else's and no leaf."""
    return logits.detach().requires_grad_() * 1


def run(backend: Backend, logits: Tensor, **arguments: Any) -> tuple[ops.PPOLoss, Tensor]:
    """The result, and the gradient over logits, which are not a leaf."""
    result = ops.logits_ppo_loss(logits, backend=backend, **arguments)
    return result, torch.autograd.grad(result.policy_loss, logits)[0]


def compare(backend: Backend, logits: Tensor, arguments: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Loss, statistics and gradient; and the gradient is where the logits were."""
    inside = from_a_head(logits)
    place = inside.data_ptr()
    found, gradient = run(backend, inside, **arguments)
    expected, exact = run("reference", from_a_head(logits.double()), **doubles(arguments))
    assert gradient.data_ptr() == place
    assert gradient.dtype == logits.dtype
    assert found.policy_loss.dtype == torch.float32
    close(found.policy_loss.double(), expected.policy_loss.detach(), tolerance)
    assert set(found.stats) == set(expected.stats)
    for name, stat in expected.stats.items():
        assert found.stats[name].dtype == torch.float32
        close(found.stats[name].double(), stat, tolerance)
    torch.testing.assert_close(found.stats["logprobs"].double(), expected.stats["logprobs"], rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(
        gradient.double(),
        exact,
        rtol=max(ROUNDING[logits.dtype], 1e-5),
        atol=1e-5 * float(exact.abs().max()) + (1e-7 if logits.dtype == torch.float16 else 0),
    )
    assert bool((gradient[~arguments["mask"]] == 0).all())


@backends
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(backend: Backend, options: dict[str, Any]) -> None:
    logits = make((3, 4, 60), torch.float32)
    arguments = tokens(logits, likely_ids(logits), temperature=options.get("temperature", 1.0))
    if "kl_coef" not in options:
        del arguments["ref_logprobs"]
    compare(backend, logits, arguments | options)
    del arguments["weights"]
    compare(backend, logits, arguments | options)
    compare(backend, logits, arguments | options | {"weights": torch.tensor([[0.5], [2.0], [1.0]])})


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 3, 8, 33, 4099])
def test_against_float64(backend: Backend, dtype: torch.dtype, vocabulary: int) -> None:
    logits = make((4, vocabulary), dtype, seed=vocabulary)
    compare(backend, logits, tokens(logits, likely_ids(logits), seed=vocabulary) | ALL)


@backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_range_and_impossible_tokens(backend: Backend, dtype: torch.dtype) -> None:
    logits = make((4, 5001), dtype, scale=60.0, barred=0.5)
    compare(backend, logits, tokens(logits, likely_ids(logits)) | {"entropy_coef": 0.1})


@pytest.mark.parametrize("vocabulary", [50_257, 152_064, 262_144])
def test_large_vocabulary(vocabulary: int) -> None:
    logits = make((2, vocabulary), torch.float32, scale=20.0, barred=0.1)
    arguments = tokens(logits, likely_ids(logits), seed=1) | {"mask": torch.ones(2, dtype=torch.bool)}
    compare("cpp", logits, arguments | ALL)


@settings(max_examples=30, deadline=None)
@given(
    backend=st.sampled_from(BACKENDS),
    dtype=st.sampled_from(DTYPES),
    mask=masks(2, 2),
    vocabulary=st.integers(1, 70),
    gap=st.integers(0, 9),
    start=st.integers(0, 9),
    seed=seeds,
)
def test_any_alignment(
    backend: Backend, dtype: torch.dtype, mask: Tensor, vocabulary: int, gap: int, start: int, seed: int
) -> None:
    """Rows that start anywhere in memory: what is beside them stays."""
    wide = make((*mask.shape, start + vocabulary + gap), dtype, seed=seed)
    logits = wide[..., start : start + vocabulary]
    arguments = tokens(logits, likely_ids(logits.contiguous()), seed=seed) | {"mask": mask} | ALL
    inside = from_a_head(wide)
    part = inside[..., start : start + vocabulary]
    found, gradient = run(backend, part, **arguments)
    expected, exact = run(backend, from_a_head(logits), **arguments)
    assert gradient.data_ptr() == part.data_ptr()
    assert torch.equal(gradient, exact)
    assert torch.equal(found.policy_loss, expected.policy_loss)
    assert torch.equal(inside[..., :start], wide[..., :start])
    assert torch.equal(inside[..., start + vocabulary :], wide[..., start + vocabulary :])


@backends
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides(backend: Backend, view: Callable[[Tensor], Tensor]) -> None:
    """A view gives the same as its copy, back to the whole; what is around it stays; shared rows are not written."""
    whole = make((2, 4, 21), torch.float32)
    arguments = tokens(view(whole), likely_ids(view(whole).contiguous())) | ALL
    plain, leaf = whole.clone().requires_grad_(), whole.clone().requires_grad_()
    inside = leaf * 1
    expected = ops.logits_ppo_loss(view(plain).contiguous(), backend=backend, **arguments)
    found = ops.logits_ppo_loss(view(inside), backend=backend, **arguments)
    assert torch.equal(found.policy_loss, expected.policy_loss)
    gradient = torch.autograd.grad(found.policy_loss, leaf)[0]
    assert torch.equal(gradient, torch.autograd.grad(expected.policy_loss, plain)[0])
    touched = (inside != whole).any(dim=-1)
    around = torch.ones_like(whole, dtype=torch.bool)
    if view(whole).stride(0) != 0:
        view(around).fill_(False)
    assert torch.equal(inside.detach()[around], whole[around])
    assert bool(touched.any()) == rows_are_disjoint(view(whole))


@backends
def test_saved_logits_are_an_error(backend: Backend) -> None:
    """Whoever saved the logits gets an error instead of the gradient in their place, and so does a second backward."""
    logits = from_a_head(make((2, 9), torch.float32))
    squares = logits.square().sum()
    arguments = tokens(logits, torch.tensor([1, 2])) | {"mask": torch.ones(2, dtype=torch.bool)}
    loss = ops.logits_ppo_loss(logits, backend=backend, **arguments).policy_loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@backends
def test_a_later_write_is_an_error(backend: Backend) -> None:
    logits = from_a_head(make((2, 9), torch.float32))
    loss = ops.logits_ppo_loss(logits, backend=backend, **tokens(logits, torch.tensor([1, 2]))).policy_loss
    logits.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@backends
def test_others_who_use_the_logits(backend: Backend) -> None:
    """Gradients from elsewhere are added, and those who only needed the logits' shape go on."""
    leaf = make((2, 9), torch.float32).requires_grad_()
    arguments = tokens(leaf, torch.tensor([1, 2])) | ALL
    logits = leaf * 1
    elsewhere = 2 * logits.sum()
    loss = ops.logits_ppo_loss(logits, backend=backend, **arguments).policy_loss
    (gradient,) = torch.autograd.grad(loss + elsewhere, leaf)
    (expected,) = torch.autograd.grad(ops.reference.logits_ppo_loss(leaf, **arguments).policy_loss, leaf)
    close(gradient, expected + 2, 1e-5)


LEAVES: dict[str, Callable[[Tensor], Tensor]] = {
    "leaf": lambda x: x,
    "view": lambda x: x[:, :-1],
    "view of a view": lambda x: x[:1].view(-1, 9),
}


@backends
@pytest.mark.parametrize("view", LEAVES.values(), ids=LEAVES)
def test_leaves_are_not_overwritten(backend: Backend, view: Callable[[Tensor], Tensor]) -> None:
    """They are the caller's. Their gradient can be asked for any number of times, scaled or not."""
    whole = make((2, 9), torch.float32)
    leaf = whole.clone().requires_grad_()
    logits = view(leaf)
    arguments = tokens(logits, torch.tensor([1, 2])[: len(logits)]) | ALL
    loss = ops.logits_ppo_loss(logits, backend=backend, **arguments).policy_loss
    first, scaled, again = (torch.autograd.grad(f * loss, leaf, retain_graph=True)[0] for f in (1, -3, 1))
    (expected,) = torch.autograd.grad(ops.reference.logits_ppo_loss(view(leaf), **arguments).policy_loss, leaf)
    close(first, expected, 1e-5)
    close(scaled, -3 * first, 1e-6)
    assert torch.equal(first, again)
    assert torch.equal(leaf.detach(), whole)


@backends
def test_without_a_gradient_the_logits_stay(backend: Backend) -> None:
    whole = make((2, 3, 50), torch.float32)
    arguments = tokens(whole, likely_ids(whole)) | ALL
    expected = ops.logits_ppo_loss(from_a_head(whole), backend=backend, **arguments)
    with torch.no_grad():
        logits = whole.clone().requires_grad_()
        under_no_grad = ops.logits_ppo_loss(logits, backend=backend, **arguments)
    constant = whole.clone()
    without = ops.logits_ppo_loss(constant, backend=backend, **arguments)
    for found in (under_no_grad, without):
        assert not found.policy_loss.requires_grad
        close(found.policy_loss, expected.policy_loss.detach(), 1e-6)
        assert torch.equal(found.stats["logprobs"], expected.stats["logprobs"])
    assert torch.equal(logits, whole)
    assert torch.equal(constant, whole)
    assert logits._version == constant._version == 0


@backends
@pytest.mark.parametrize("factor", [0.0, 1.0, -2.5])
def test_scaled_loss(backend: Backend, factor: float) -> None:
    whole = make((2, 3, 50), torch.float32)
    arguments = tokens(whole, likely_ids(whole)) | ALL
    leaf = whole.clone().requires_grad_()
    _, expected = run(backend, from_a_head(whole), **arguments)
    loss = factor * ops.logits_ppo_loss(leaf * 1, backend=backend, **arguments).policy_loss
    close(torch.autograd.grad(loss, leaf)[0], factor * expected, 1e-7)


@backends
def test_float64_arguments(backend: Backend) -> None:
    """float64 in gives float64 out, whatever the logits are."""
    logits = make((3, 50), torch.float32)
    arguments = doubles(tokens(logits, likely_ids(logits))) | ALL
    if backend == "triton":
        with pytest.raises(TypeError, match="'triton' computes in float32; got float64"):
            ops.logits_ppo_loss(from_a_head(logits), backend=backend, **arguments)
        return
    found, gradient = run(backend, from_a_head(logits), **arguments)
    assert found.policy_loss.dtype == found.stats["approx_kl"].dtype == torch.float64
    assert found.stats["logprobs"].dtype == gradient.dtype == torch.float32
    exact, exact_gradient = run(backend, from_a_head(logits.double()), **arguments)
    expected, expected_gradient = run("reference", from_a_head(logits.double()), **arguments)
    close(exact.policy_loss.detach(), expected.policy_loss.detach())
    close(exact_gradient, expected_gradient)
    close(found.policy_loss.detach(), expected.policy_loss.detach(), 1e-5)


def test_derivative_at_ties() -> None:
    """Where max, min and clamp have none, it is autograd's: the ends of the clip range, the dual clip's, +-20."""
    logits = torch.zeros(7, 2, dtype=torch.float64)  # log-prob -log 2
    ratios = torch.tensor([0.0, 20.0, 20.5, -20.0, -20.5, math.log(2.0), math.log(2.0)], dtype=torch.float64)
    for clip in (0.0, 1.0):
        for sign in (1.0, -1.0):
            arguments: dict[str, Any] = {
                "ids": torch.zeros(7, dtype=torch.int64),
                "old_logprobs": -math.log(2.0) - ratios,
                "ref_logprobs": -math.log(2.0) - ratios,
                "advantages": torch.full((7,), sign, dtype=torch.float64),
                "mask": torch.ones(7, dtype=torch.bool),
            }
            options = {"cliprange": clip, "dual_clip": 2.0, "kl_coef": 0.5, "kl_estimator": "k3"}
            found, gradient = run("cpp", from_a_head(logits), **arguments, **options)
            expected, exact = run("reference", from_a_head(logits), **arguments, **options)
            close(found.policy_loss.detach(), expected.policy_loss.detach())
            close(gradient, exact)


Rows = Callable[[Tensor, slice], Tensor]


def rows_stand_alone(rows: Rows, logits: Tensor) -> bool:
    """Whether rows(logits, which) has the same bits for each row as for all at once, on any number of threads."""
    together = rows(logits, slice(0, len(logits)))
    threads = torch.get_num_threads()
    agree = True
    for i in range(len(logits)):
        torch.set_num_threads(1 + i % 3)
        agree &= torch.equal(rows(logits, slice(i, i + 1))[0], together[i])
    torch.set_num_threads(threads)
    return agree


@backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(backend: Implementation, dtype: torch.dtype) -> None:
    logits = make((5, 3001), dtype)
    arguments = tokens(logits, torch.arange(5)) | {"mask": torch.ones(5, dtype=torch.bool)}

    def rows(logits: Tensor, which: slice) -> Tensor:
        own = {name: x[which] for name, x in arguments.items()}
        inside = from_a_head(logits[which])
        found, gradient = run(backend, inside, **own, **ALL)
        return torch.cat([gradient.double(), found.stats["logprobs"].double()[:, None]], dim=1)

    assert rows_stand_alone(rows, logits)
    assert torch.equal(rows(logits, slice(0, 5)), rows(logits, slice(0, 5)))
    own = ops.gather_logprobs(logits, arguments["ids"], backend=backend)
    assert torch.equal(rows(logits, slice(0, 5))[:, -1].float(), own)


def test_rows_that_depend_on_others_are_noticed() -> None:
    """Else the test above could pass by seeing nothing."""

    def one_sum(logits: Tensor, which: slice) -> Tensor:
        total = logits[which].flatten().cumsum(0)[3000::3001]
        return torch.diff(total, prepend=torch.zeros(1))

    assert not rows_stand_alone(one_sum, make((5, 3001), torch.float32))


def test_sums_do_not_depend_on_threads_or_chunks() -> None:
    """More rows than PyTorch sums by one thread; and more than 65,535."""
    logits = make((70_000, 3), torch.float32)
    arguments = tokens(logits, torch.arange(70_000) % 3)
    results = []
    threads = torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        result, gradient = run("cpp", from_a_head(logits), **arguments, **ALL)
        results.append([result.policy_loss.detach(), gradient, *result.stats.values()])
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    expected = run("reference", from_a_head(logits.double()), **doubles(arguments), **ALL)[0]
    close(results[0][0].double(), expected.policy_loss.detach(), 1e-6)


def test_grid_of_more_rows_than_a_dimension_y_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_fast.kernels import logits_ppo_loss as module

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            self.grid = grid
            return lambda *_, **__: None

    kernel = Kernel()
    monkeypatch.setattr(module, "_cross_entropy_kernel", kernel)
    ids = torch.zeros(70_000, dtype=torch.int64)
    cross_entropy_rows_("triton", torch.zeros(70_000, 2), ids, ids == 0, None, torch.tensor(1.0))
    assert kernel.grid == (70_000,)


@backends
def test_rows_outside_the_mask(backend: Backend) -> None:
    """They may hold NaN, in the logits and in all else, and ids that are none."""
    logits = make((2, 3, 50), torch.float32)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    arguments = tokens(logits, likely_ids(logits)) | ALL | {"mask": mask}
    expected, exact = run(backend, from_a_head(logits), **arguments)
    bad = {
        name: torch.where(mask, x, torch.nan)
        for name, x in arguments.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    bad["ids"] = torch.where(mask, arguments["ids"], -7)
    found, gradient = run(backend, from_a_head(torch.where(mask[..., None], logits, torch.nan)), **arguments | bad)
    assert torch.equal(gradient, exact)
    assert torch.equal(found.policy_loss, expected.policy_loss)
    for name, stat in expected.stats.items():
        assert torch.equal(found.stats[name], stat)
    assert bool((gradient[~mask] == 0).all())


@backends
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
def test_nothing_in_the_mask(backend: Backend, shape: tuple[int, int]) -> None:
    zeros, mask = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    logits = torch.full((*shape, 5), torch.nan)
    found, gradient = run(
        backend, from_a_head(logits), ids=mask.long(), old_logprobs=zeros, advantages=zeros, mask=mask
    )
    assert found.policy_loss == 0
    assert bool((gradient == 0).all())
    assert all(bool((stat == 0).all()) for stat in found.stats.values())


@backends
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_are_not_hidden(backend: Backend, bad: float) -> None:
    """NaN, plus infinity and nothing but -inf make the loss NaN, and the gradient of that row only."""
    logits = make((3, 3000), torch.float32)
    logits[0, 2100] = bad
    logits[2] = -torch.inf
    arguments = tokens(make((3, 3000), torch.float32), torch.tensor([7, 7, 7]))
    arguments["mask"] = torch.ones(3, dtype=torch.bool)
    found, gradient = run(backend, from_a_head(logits), **arguments)
    assert found.policy_loss.isnan()
    assert found.stats["logprobs"].isnan().tolist() == [True, False, True]
    assert gradient.isnan().any(dim=1).tolist() == [True, False, True]


def test_ids_out_of_range() -> None:
    """In Triton the loss is NaN; in C++ it is an error, before anything is written, also without Python's checks."""
    logits, ids = make((3, 9), torch.float32), torch.tensor([-1, 2**40, 8])
    arguments = tokens(logits, torch.tensor([0, 1, 2])) | {"mask": torch.ones(3, dtype=torch.bool)}
    rest = [arguments[name] for name in ("old_logprobs", "advantages", "mask", "weights", "ref_logprobs")]
    options: dict[str, Any] = {**ALL, "temperature": 1.0, "num_tokens": torch.tensor(3.0)}
    found = ppo_rows_("triton", logits.clone(), ids, *rest, **options)
    assert found[0].isnan().tolist() == found[1].isnan().tolist() == [True, True, False]
    kept = logits.clone()
    with pytest.raises(ValueError, match="ids must be from 0 to 8, unless masked out; got -1 in row 0"):
        ppo_rows_("cpp", kept, ids, *rest, **options)
    with pytest.raises(ValueError, match="ids must be from 0 to 8, unless masked out; got -1 in row 0"):
        cross_entropy_rows_("cpp", kept, ids, arguments["mask"], None, torch.tensor(3.0))
    assert torch.equal(kept, logits)


@backends
def test_offsets_beyond_32_bits(backend: Implementation) -> None:
    """Rows 2^31 elements apart. The memory between them is never touched, so it is never there."""
    stride = 2**31 + 40
    storage = torch.empty(2 * stride + 64, dtype=torch.bfloat16)
    logits = storage.as_strided((3, 50), (stride, 1))
    logits.copy_(make((3, 50), torch.bfloat16))
    copied = logits.clone()
    arguments = tokens(copied, torch.tensor([49, 3, 48])) | {"mask": torch.ones(3, dtype=torch.bool)}
    rest = [arguments[name] for name in ("ids", "old_logprobs", "advantages", "mask", "weights", "ref_logprobs")]
    options: dict[str, Any] = {**ALL, "temperature": 1.0, "num_tokens": torch.tensor(3.0)}
    found, expected = (ppo_rows_(backend, x, *rest, **options) for x in (logits, copied))
    assert torch.equal(found, expected)
    assert torch.equal(logits, copied)


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(backend: Implementation, dtype: torch.dtype, weighted: bool) -> None:
    logits = make((4, 1003), dtype, barred=0.2)
    logits[1, 5] = logits[1, 7] = 70.0  # two that are the largest
    ids = likely_ids(logits)
    ids[0] = flat(logits)[0].argmax()
    ids[1] = 7
    mask, count = torch.tensor([True, True, True, False]), torch.tensor(3.0)
    weights = torch.tensor([0.5, 2.0, 3.0, math.nan]) if weighted else None
    leaf = logits.double().requires_grad_()
    losses = F.cross_entropy(leaf[:3], ids[:3], reduction="none") * (1 if weights is None else weights[:3])
    (exact,) = torch.autograd.grad(losses.sum() / 3, leaf)

    gradient = logits.clone()
    found = cross_entropy_rows_(backend, gradient, ids, mask, weights, count)
    close(found[1, :3].double(), losses.detach(), 1e-5)
    close(found[0, :3].double(), torch.log_softmax(leaf, -1).gather(-1, ids[:, None])[:3, 0].detach(), 3e-6)
    assert found[2].tolist() == [1, 1, float(ids[2] == logits[2].argmax()), 0]
    assert bool((found[:, 3] == 0).all())
    torch.testing.assert_close(
        gradient.double(), exact, rtol=max(ROUNDING[dtype], 1e-5), atol=1e-6 * float(exact.abs().max()) + 1e-7
    )


def test_chunks_put_side_by_side() -> None:
    """As the linear losses use it: what is found of chunks, summed at once, has the bits of one call."""
    logits = make((7, 40), torch.float32)
    arguments = tokens(logits, likely_ids(logits))
    names = ("old_logprobs", "advantages", "mask", "weights", "ref_logprobs")
    options: dict[str, Any] = {**ALL, "temperature": 1.0, "num_tokens": torch.tensor(13.0, dtype=torch.float64)}
    found = torch.cat(
        [
            ppo_rows_("cpp", logits[s].clone(), arguments["ids"][s], *(arguments[n][s] for n in names), **options)
            for s in (slice(0, 3), slice(3, 7))
        ],
        dim=1,
    )
    summary = ppo_summary(found, arguments["mask"], options["num_tokens"], torch.float32, torch.float32)
    whole = ops.logits_ppo_loss(from_a_head(logits), backend="cpp", **arguments, **ALL)
    assert torch.equal(summary.policy_loss, whole.policy_loss)
    for name, stat in whole.stats.items():
        assert torch.equal(summary.stats[name], stat)


def row_operators(backend: Backend) -> tuple[Any, Any]:
    if backend == "cpp":
        load_compiled_ops()
        cpp = torch.ops.rlhf_fast
        return cpp._logits_ppo_loss_.default, cpp._logits_cross_entropy_.default
    from rlhf_fast.kernels import logits_ppo_loss

    return logits_ppo_loss.logits_ppo_loss_, logits_ppo_loss.logits_cross_entropy_


@backends
@pytest.mark.parametrize("optional", [False, True])
def test_opcheck(backend: Backend, optional: bool) -> None:
    """Schema (what is written is said), shapes without data, and tracing with unknown sizes."""
    logits = make((2, 3, 17), torch.float32)
    a = tokens(logits, likely_ids(logits))
    weights, ref = (a["weights"], a["ref_logprobs"]) if optional else (None, None)
    count, options = torch.tensor(4.0), (0.8, 0.9, 1.2, 1.5, 0.1, 3, 0.05)
    ppo, cross_entropy = row_operators(backend)
    torch.library.opcheck(
        ppo, (logits, a["ids"], a["old_logprobs"], a["advantages"], a["mask"], weights, ref, count, *options)
    )
    torch.library.opcheck(cross_entropy, (logits, a["ids"], a["mask"], weights, count, 0.8))


@backends
def test_compiled_graph(backend: Backend) -> None:
    """torch.compile takes the op whole, backward pass included."""
    normals = Normals(0, torch.float32)
    weight = normals(4, 33).requires_grad_()

    def loss(hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        result = ops.logits_ppo_loss(hidden @ weight, backend=backend, **arguments, **ALL)
        return 2 * result.policy_loss

    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 8):
        hidden = normals(rows, 4).requires_grad_()
        arguments = tokens(hidden @ weight, torch.arange(rows))
        eager, traced = (torch.autograd.grad(f(hidden, arguments), (hidden, weight)) for f in (loss, compiled))
        for a, b in zip(traced, eager, strict=True):
            close(a, b, 1e-6)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability: str) -> None:
    """The C++ tests of this file once more, in a process where PyTorch is told that the CPU is a lesser one."""
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        return  # this is that process
    if capability == torch.backends.cpu.get_cpu_capability().lower():
        return  # the tests above were run with it
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "-k", "cpp and not opcheck and not compiled", __file__],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
