"""gather_logprobs in C++ and in Triton against the reference in float64: what fast code gets wrong.

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

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops import Backend
from rlhf_fast.ops._dispatch import load_compiled_ops
from tests.ops.op_cases import Normals, close, seeds

IGNORE = -100
BACKENDS: list[Backend] = ["cpp", "triton"]
backends = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # one unit in the last place

# numpy's remarks on inf - inf in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def make(
    shape: tuple[int, ...], dtype: torch.dtype, *, scale: float = 3.0, barred: float = 0.0, seed: int = 0
) -> Tensor:
    """Logits up to +-60, the given part of them -inf, but never a row's first."""
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(-60, 60).to(dtype)
    bar = torch.rand(shape, generator=generator) < barred
    bar[..., 0] = False
    return logits.masked_fill(bar, -torch.inf)


def likely_ids(logits: Tensor) -> Tensor:
    """Ids [...] of finite logits, a different one in each row."""
    turned = torch.stack(
        [row.isfinite().nonzero()[i % int(row.isfinite().sum())] for i, row in enumerate(flat(logits))]
    )
    return turned.reshape(logits.shape[:-1])


def flat(logits: Tensor) -> Tensor:
    return logits.reshape(-1, logits.shape[-1])


def compare(
    backend: Backend, logits: Tensor, ids: Tensor, *, temperature: float = 1.0, tolerance: float = 3e-6
) -> None:
    """Log-probs, entropies and the gradient of a random mixture of them."""
    weights = Normals(1, torch.float32)
    g, h = weights(*ids.shape), weights(*ids.shape)

    def run(leaf: Tensor, backend: Backend) -> tuple[Tensor, Tensor, Tensor]:
        logprobs, entropy = ops.gather_logprobs(
            leaf, ids, temperature=temperature, return_entropy=True, backend=backend
        )
        (gradient,) = torch.autograd.grad([logprobs, entropy], leaf, [g.to(logprobs.dtype), h.to(logprobs.dtype)])
        return logprobs.detach(), entropy.detach(), gradient

    found = run(logits.detach().requires_grad_(), backend)
    expected = run(logits.detach().double().requires_grad_(), "reference")
    for actual, exact in zip(found[:2], expected[:2], strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=1e-6)
    assert found[2].dtype == logits.dtype
    largest = float(expected[2].abs().max())
    torch.testing.assert_close(
        found[2].double(),
        expected[2],
        rtol=ROUNDING[logits.dtype],
        atol=1e-6 * largest + (1e-7 if logits.dtype == torch.float16 else 0),
    )


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 2, 3, 8, 33, 1000, 4099, 9001])
def test_against_float64(backend: Backend, dtype: torch.dtype, vocabulary: int) -> None:
    logits = make((3, vocabulary), dtype, seed=vocabulary)
    compare(backend, logits, likely_ids(logits))


@pytest.mark.parametrize("vocabulary", [2, 9, 70, 3001])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("cpp", torch.float32), ("cpp", torch.float64), ("triton", torch.float32)]
)
@pytest.mark.parametrize("gap", [1.0, 5.0, 9.0, 14.0, 20.0])
def test_a_token_that_is_almost_certain(backend: Backend, dtype: torch.dtype, vocabulary: int, gap: float) -> None:
    """Its log-prob and its gradient are small differences from 0, and as exact as any."""
    logits = make((3, vocabulary), dtype, scale=0.1) - gap - math.log(vocabulary)
    ids = torch.tensor([0, vocabulary // 2, vocabulary - 1])
    logits[torch.arange(3), ids] = 0
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    logprobs, entropy = ops.gather_logprobs(leaf, ids, return_entropy=True, backend=backend)
    expected = ops.reference.gather_logprobs(exact, ids, return_entropy=True)
    for found, right in zip((logprobs, entropy), expected, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=3e-6, atol=0)
    (gradient,) = torch.autograd.grad(logprobs.sum(), leaf)
    (right,) = torch.autograd.grad(expected[0].sum(), exact)
    torch.testing.assert_close(gradient.double(), right, rtol=1e-5, atol=0)


@backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_range_and_impossible_tokens(backend: Backend, dtype: torch.dtype) -> None:
    logits = make((3, 5001), dtype, scale=60.0, barred=0.5)
    compare(backend, logits, likely_ids(logits), temperature=0.7)
    logits[:, 1:4500] = -torch.inf  # whole blocks of them, after one that is not
    compare(backend, logits, likely_ids(logits))
    logits[:, :4500] = -torch.inf  # whole blocks of them before the first that is not
    compare(backend, logits, likely_ids(logits))


def test_large_vocabulary() -> None:
    """Small probabilities beside a large one: summed naively in float32, 262,000 times 1e-8 is lost."""
    logits = torch.full((1, 262_144), -18.0)
    logits[0, 77_777] = 0.0
    logprob = ops.gather_logprobs(logits, torch.tensor([77_777]), backend="cpp")
    close(logprob.double(), [-math.log1p(262_143 * math.exp(-18.0))], 1e-7)
    logits = make((2, 262_144), torch.float32, scale=20.0)
    compare("cpp", logits, torch.tensor([5, 262_143]))


@backends
@settings(max_examples=20, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 3),
    vocabulary=st.integers(1, 70),
    gap=st.integers(0, 9),
    start=st.integers(0, 9),
    barred=st.sampled_from([0.0, 0.5]),
    temperature=st.sampled_from([0.6, 1.0, 2.0]),
    seed=seeds,
)
def test_any_alignment(
    backend: Backend,
    dtype: torch.dtype,
    rows: int,
    vocabulary: int,
    gap: int,
    start: int,
    barred: float,
    temperature: float,
    seed: int,
) -> None:
    """Rows that start anywhere in memory: 16-byte loads begin and end elsewhere in each."""
    wide = make((rows, start + vocabulary + gap), dtype, seed=seed)
    logits = wide[:, start : start + vocabulary]
    logits.copy_(make((rows, vocabulary), dtype, barred=barred, seed=seed + 1))
    compare(backend, logits, likely_ids(logits), temperature=temperature, tolerance=1e-5)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "without the last token": lambda x: x[:, :-1],
    "batch second": lambda x: x.transpose(0, 1),
    "every second row": lambda x: x[:, ::2],
    "part of the vocabulary": lambda x: x[..., 3:20],
    "vocabulary not contiguous": lambda x: x[..., ::2],
    "one row many times": lambda x: x[:1, :1].expand(2, 3, 21),
    "four levels": lambda x: x.reshape(2, 1, 2, 2, 21)[:, :, :, :1].transpose(0, 2),
    "one row": lambda x: x[1, 2],
}


@backends
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("inplace", [False, True])
def test_strides(backend: Backend, view: Callable[[Tensor], Tensor], inplace: bool) -> None:
    """A view gives the same as its copy; in place, what is around it stays, and shared rows are never overwritten."""
    whole = make((2, 4, 21), torch.float32)
    ids = likely_ids(view(whole).contiguous())

    def run(whole: Tensor, logits: Tensor, inplace: bool) -> tuple[Tensor, Tensor, Tensor]:
        logprobs, entropy = ops.gather_logprobs(
            logits, ids, return_entropy=True, inplace_backward=inplace, backend=backend
        )
        (gradient,) = torch.autograd.grad((logprobs - 0.5 * entropy).sum(), whole)
        return logprobs, entropy, gradient

    plain, leaf = whole.clone().requires_grad_(), whole.clone().requires_grad_()
    inside = leaf * 1
    expected = run(plain, view(plain).contiguous(), False)
    found = run(leaf, view(inside), inplace)
    for actual, exact in zip(found, expected, strict=True):
        assert torch.equal(actual, exact)
    untouched = torch.ones_like(whole, dtype=torch.bool)
    if view(whole).stride(0) != 0:
        view(untouched).fill_(False)
    assert torch.equal(inside.detach()[untouched], whole[untouched])


@backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_overwrites_the_logits(backend: Backend, dtype: torch.dtype) -> None:
    ids = torch.tensor([3, IGNORE, 998, 0])
    gradients = []
    for inplace in (False, True):
        logits = make((4, 999), dtype).requires_grad_()
        logprobs, entropy = ops.gather_logprobs(
            logits, ids, return_entropy=True, inplace_backward=inplace, backend=backend
        )
        (gradient,) = torch.autograd.grad((logprobs + entropy).sum(), logits)
        assert (gradient.data_ptr() == logits.data_ptr()) is inplace
        gradients.append(gradient)
    assert torch.equal(*gradients)


@backends
def test_in_place_is_noticed(backend: Backend) -> None:
    """Someone else who needs the logits in the backward pass gets an error instead of the gradient in their place."""
    leaf = make((2, 9), torch.float32).requires_grad_()
    logits = leaf * 1
    squares = logits.square().sum()  # saves the logits
    logprobs = ops.gather_logprobs(logits, torch.tensor([1, 2]), inplace_backward=True, backend=backend)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


@backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(backend: Backend, dtype: torch.dtype) -> None:
    def run(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        leaf = logits.detach().clone().requires_grad_()
        logprobs, entropy = ops.gather_logprobs(leaf, ids, return_entropy=True, backend=backend)
        return logprobs, entropy, torch.autograd.grad((logprobs - entropy).sum(), leaf)[0]

    logits, ids = make((6, 3001), dtype), torch.arange(6)
    together = run(logits, ids)
    threads = torch.get_num_threads()
    for alone in range(6):
        torch.set_num_threads(1 + alone % 3)
        row = run(logits[alone : alone + 1], ids[alone : alone + 1])
        torch.set_num_threads(threads)
        for one, all_rows in zip(row, together, strict=True):
            assert torch.equal(one[0], all_rows[alone])


@backends
def test_rows_that_do_not_count(backend: Backend) -> None:
    """Ignored rows and rows without a gradient may hold NaN: nothing of it comes out."""
    logits = make((4, 50), torch.float32)
    logits[1] = torch.nan
    logits[2] = torch.nan
    logits.requires_grad_()
    logprobs, entropy = ops.gather_logprobs(
        logits, torch.tensor([4, IGNORE, 5, 6]), return_entropy=True, backend=backend
    )
    assert logprobs[1] == entropy[1] == 0
    assert logprobs[2].isnan()
    (gradient,) = torch.autograd.grad((logprobs + entropy)[[0, 1, 3]].sum(), logits)
    assert bool((gradient[1:3] == 0).all())
    assert bool((gradient[[0, 3]] != 0).any(dim=1).all())


@backends
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_are_not_hidden(backend: Backend, bad: float) -> None:
    """As log_softmax has it: NaN, plus infinity and nothing but -inf make the row NaN, and only that row."""
    logits = make((3, 3000), torch.float32)
    logits[0, 2100] = bad
    logits[2] = -torch.inf
    logits.requires_grad_()
    logprobs, entropy = ops.gather_logprobs(logits, torch.tensor([7, 7, 7]), return_entropy=True, backend=backend)
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [True, False, True]
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits)
    assert bool(gradient[0].isnan().any())
    assert bool(gradient[1].isfinite().all())


def test_ids_out_of_range_in_triton() -> None:
    logits = make((4, 9), torch.float32).requires_grad_()
    ids = torch.tensor([-1, 9, 2**40, 8])
    logprobs, entropy = ops.gather_logprobs(logits, ids, return_entropy=True, backend="triton")
    assert logprobs.isnan().tolist() == [True, True, True, False]
    assert bool(entropy.isfinite().all())
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    assert bool(gradient.isfinite().all())


def test_triton_refuses_float64() -> None:
    with pytest.raises(TypeError, match="Triton takes float32, bfloat16 and float16 logits"):
        ops.gather_logprobs(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), backend="triton")


@backends
def test_offsets_beyond_32_bits(backend: Backend) -> None:
    """Rows 2^31 elements apart. The memory between them is never touched, so it is never there."""
    stride = 2**31 + 40
    storage = torch.empty(2 * stride + 64, dtype=torch.bfloat16)
    logits = storage.as_strided((3, 50), (stride, 1))
    logits.copy_(make((3, 50), torch.bfloat16))
    copied, ids = logits.clone().requires_grad_(), torch.tensor([49, 3, 48])
    logits.requires_grad_()
    gradients = []
    for leaf in (copied, logits):
        logprobs, entropy = ops.gather_logprobs(
            leaf, ids, return_entropy=True, inplace_backward=leaf is logits, backend=backend
        )
        gradients.append(torch.autograd.grad((logprobs + entropy).sum(), leaf)[0])
    assert gradients[1].data_ptr() == logits.data_ptr()
    assert torch.equal(*gradients)


def public_operator(backend: Backend) -> Callable[..., tuple[Tensor, ...]]:
    if backend == "cpp":
        load_compiled_ops()
        return torch.ops.rlhf_fast.gather_logprobs.default
    from rlhf_fast.kernels import gather_logprobs

    return gather_logprobs._forward


@backends
@pytest.mark.parametrize("return_entropy", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_opcheck(backend: Backend, return_entropy: bool, inplace: bool) -> None:
    """Schema, autograd registration, shapes without data, and tracing with unknown sizes."""
    logits = make((2, 3, 17), torch.float32).requires_grad_()
    arguments = (logits, likely_ids(logits.detach()), 0.8, return_entropy, IGNORE, inplace)
    torch.library.opcheck(public_operator(backend), arguments)


def test_opcheck_of_the_cpp_passes() -> None:
    load_compiled_ops()
    cpp = torch.ops.rlhf_fast
    logits, ids = make((2, 3, 17), torch.bfloat16), torch.ones(2, 3, dtype=torch.int32)
    torch.library.opcheck(cpp._gather_logprobs_forward.default, (logits, ids, 0.8, True, IGNORE))
    _, entropy, stats = cpp._gather_logprobs_forward(logits, ids, 0.8, True, IGNORE)
    for g, h in ((torch.ones(2, 3), None), (None, torch.ones(2, 3)), (torch.ones(2, 3), torch.ones(2, 3))):
        torch.library.opcheck(cpp._gather_logprobs_backward.default, (g, h, logits, ids, stats, entropy, 0.8, IGNORE))


@backends
@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_graph(backend: Backend, inplace: bool) -> None:
    """torch.compile takes the op whole, backward pass included; in place or not is then the compiler's business."""

    def loss(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        logprobs, entropy = ops.gather_logprobs(
            hidden @ weight, ids, temperature=0.9, return_entropy=True, inplace_backward=inplace, backend=backend
        )
        return (logprobs - 0.1 * entropy).sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 8):
        normals = Normals(rows, torch.float32)
        hidden, weight = normals(rows, 4).requires_grad_(), normals(4, 33).requires_grad_()
        ids = torch.arange(rows)
        eager, traced = (torch.autograd.grad(f(hidden, weight, ids), (hidden, weight)) for f in (loss, compiled))
        for a, b in zip(traced, eager, strict=True):
            close(a, b, 1e-6)


def test_second_derivative_is_an_error() -> None:
    logits = make((2, 9), torch.float32).requires_grad_()
    logprobs = ops.gather_logprobs(logits, torch.tensor([1, 2]), backend="cpp")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(logprobs.sum(), logits, create_graph=True)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability: str) -> None:
    """The C++ tests of this file once more, in a process where PyTorch is told that the CPU is a lesser one."""
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        return  # this is that process
    if capability == torch.backends.cpu.get_cpu_capability().lower():
        return  # the tests above were run with it
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-k",
            "cpp and not opcheck and not compiled",
            __file__,
        ],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
