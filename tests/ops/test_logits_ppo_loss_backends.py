"""logits_ppo_loss in C++ and in Triton against the reference in float64: what fast code gets wrong.

What writing over the logits gets wrong is in test_logits_ppo_loss_in_place.py, the row operators are in
test_loss_rows.py. Triton runs on CPU tensors here, by its interpreter (tests/conftest.py). The C++ kernels of the
instruction sets that this CPU would not choose run in a process of their own, at the end.
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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops import Backend
from rlhf_fast.ops._dispatch import Implementation
from tests.ops.logits_loss_cases import ALL, OPTIONS, backends, doubles, from_a_head, run, tokens
from tests.ops.op_cases import Normals, close, masks, seeds
from tests.ops.test_gather_logprobs_backends import DTYPES, ROUNDING, likely_ids, make

# numpy's remarks on inf - inf in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


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


@backends
@settings(max_examples=15, deadline=None)
@given(
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


FILES = [
    str(Path(__file__).with_name(name))
    for name in (Path(__file__).name, "test_logits_ppo_loss_in_place.py", "test_loss_rows.py")
]


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability: str) -> None:
    """The C++ tests once more, in a process where PyTorch is told that the CPU is a lesser one."""
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        return  # this is that process
    if capability == torch.backends.cpu.get_cpu_capability().lower():
        return  # the tests above were run with it
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "-k", "cpp and not opcheck and not compiled", *FILES],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
