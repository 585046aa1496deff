"""linear_logprobs' chunks in C++ and in Triton against the reference in float64: what fast code gets wrong.

Triton runs on CPU tensors here, by its interpreter (tests/conftest.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.memory import peak_bytes
from rlhf_fast import ops
from rlhf_fast.ops import Backend, _head_chunks
from rlhf_fast.ops.linear_logprobs import _backward, _forward
from tests.ops.op_cases import Normals, close, seeds

IGNORE = -100
BACKENDS: list[Backend] = ["cpp", "triton"]
backends = pytest.mark.parametrize("backend", BACKENDS)
H, V = 12, 37

# numpy's remarks on inf - inf in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def chunks_of_four_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_head_chunks.CHUNK_ROWS, "cpu", 4)
    monkeypatch.setattr(_head_chunks, "CAST_ELEMENTS", 10 * H)


def make(rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [rows, H], weight [V, H], bias [V], ids [rows]"""
    normal = Normals(seed, dtype)
    ids = torch.randint(V, (rows,), generator=normal.generator)
    return normal(rows, H), normal(V, H), normal(V), ids


def run(
    backend: Backend, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, **options: Any
) -> list[Tensor]:
    """log-probs, entropies and the gradients of a random mixture of them"""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logprobs, entropy = ops.linear_logprobs(
        leaves[0],
        leaves[1],
        ids,
        bias=None if bias is None else leaves[2],
        return_entropy=True,
        backend=backend,
        **options,
    )
    normal = Normals(1, logprobs.dtype)
    upstream = [normal(*ids.shape), normal(*ids.shape)]
    return [logprobs.detach(), entropy.detach(), *torch.autograd.grad([logprobs, entropy], leaves, upstream)]


def compare(found: list[Tensor], exact: list[Tensor], tolerance: float = 2e-6) -> None:
    for a, b in zip(found, exact, strict=True):
        largest = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance * max(largest, 1.0))


@backends
@settings(max_examples=15, deadline=None)
@given(
    rows=st.sampled_from([1, 3, 4, 5, 8, 9]),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    with_bias=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
    scale=st.sampled_from([1.0, 0.3]),
    temperature=st.sampled_from([1.0, 0.7]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=seeds,
)
def test_against_float64(
    backend: Backend,
    rows: int,
    ignored: float,
    with_bias: bool,
    softcap: float | None,
    scale: float,
    temperature: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Chunks of four rows, the last one of one to four; a weight in half precision is cast ten words at a time."""
    hidden, weight, bias, ids = make(rows, dtype, seed)
    ids[torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < ignored] = IGNORE
    options = {"softcap": softcap, "scale": scale, "temperature": temperature}
    found = run(backend, hidden, weight, bias if with_bias else None, ids, **options)
    exact = run("reference", hidden.double(), weight.double(), bias.double() if with_bias else None, ids, **options)
    compare(found[:2], exact[:2])
    assert [g.dtype for g in found[2:]] == [dtype] * (3 if with_bias else 2)
    compare(found[2:], exact[2:], 5e-6 if dtype == torch.float32 else 2.0**-7)


@backends
@pytest.mark.parametrize("gathered", [True, False])
def test_rows_that_do_not_count(backend: Backend, gathered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignored rows and rows without a gradient may hold NaN, on a CPU, where they are left out, and as on a GPU."""
    if not gathered:
        monkeypatch.setattr(_head_chunks, "used_rows", lambda used: None)
    hidden, weight, bias, ids = make(7)
    hidden[2], hidden[5] = torch.nan, torch.nan
    ids[2] = IGNORE
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    logprobs, entropy = ops.linear_logprobs(hidden, weight, ids, bias=bias, return_entropy=True, backend=backend)
    assert logprobs[2] == entropy[2] == 0
    assert logprobs.isnan().tolist() == [i == 5 for i in range(7)]
    counted = torch.tensor([0, 1, 3, 4, 6])
    gradients = torch.autograd.grad((logprobs + entropy)[counted].sum(), leaves)
    exact = gradients_of_the_sum(*(x.detach().double() for x in (hidden[counted], weight, bias)), ids[counted])
    assert bool((gradients[0][[2, 5]] == 0).all())
    compare([gradients[0][counted], *gradients[1:]], exact)


def gradients_of_the_sum(hidden: Tensor, weight: Tensor, bias: Tensor, ids: Tensor) -> list[Tensor]:
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    logprobs, entropy = ops.linear_logprobs(hidden, weight, ids, bias=bias, return_entropy=True, backend="reference")
    return list(torch.autograd.grad((logprobs + entropy).sum(), leaves))


@backends
def test_only_the_gradients_that_are_needed(backend: Backend) -> None:
    """With each of hidden, weight and bias frozen in turn the others' gradients have the same bits."""
    hidden, weight, bias, ids = make(6)
    everything = run(backend, hidden, weight, bias, ids)[2:]
    for frozen in range(3):
        leaves = [x.detach().requires_grad_(i != frozen) for i, x in enumerate((hidden, weight, bias))]
        logprobs, entropy = ops.linear_logprobs(
            leaves[0], leaves[1], ids, bias=leaves[2], return_entropy=True, backend=backend
        )
        normal = Normals(1, torch.float32)
        torch.autograd.backward([logprobs, entropy], [normal(6), normal(6)])
        for i, leaf in enumerate(leaves):
            if i == frozen:
                assert leaf.grad is None
            else:
                assert leaf.grad is not None
                assert torch.equal(leaf.grad, everything[i])


@pytest.mark.parametrize(("backend", "rows"), [("cpp", 64), ("cpp", 150), ("triton", 6)])
def test_a_row_has_the_same_bits_in_any_batch(backend: Backend, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in a batch, elsewhere in a chunk, with other rows left out; and again, and with another thread."""
    if backend == "cpp":
        monkeypatch.setitem(_head_chunks.CHUNK_ROWS, "cpu", 64)
    normal = Normals(3, torch.float32)
    hidden, weight, ids = normal(rows, 96), normal(1111, 96), torch.arange(rows)
    together = run(backend, hidden, weight, None, ids)
    again = run(backend, hidden, weight, None, ids)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))

    threads = torch.get_num_threads()
    for row in {0, 5, rows - 1}:
        for first in (row, max(0, row - 2)):
            torch.set_num_threads(2 if first == row else 1)
            part = slice(first, row + 1)
            alone = forward_and_grad_hidden(backend, hidden[part], weight, ids[part])
            torch.set_num_threads(threads)
            whole = forward_and_grad_hidden(backend, hidden, weight, ids)
            for a, b in zip(alone, whole, strict=True):
                assert torch.equal(a[-1], b[row])
    moved = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    turned = forward_and_grad_hidden(backend, hidden[moved], weight, ids[moved])
    for a, b in zip(turned, forward_and_grad_hidden(backend, hidden, weight, ids), strict=True):
        assert torch.equal(a, b[moved])


def forward_and_grad_hidden(backend: Backend, hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    leaf = hidden.detach().requires_grad_()
    logprobs, entropy = ops.linear_logprobs(leaf, weight, ids, return_entropy=True, backend=backend)
    return logprobs, entropy, torch.autograd.grad((logprobs - entropy).sum(), leaf)[0]


def test_products_of_other_shapes_have_other_bits() -> None:
    """Why chunks are filled up: without that the test above must be able to fail."""
    normal = Normals(3, torch.float32)
    hidden, weight = normal(64, 96), normal(1111, 96)
    whole, part = torch.empty(64, 1111), torch.empty(64, 1111)
    _head_chunks.product(hidden, weight, whole)
    equal = []
    for rows in range(1, 64):
        _head_chunks.product(hidden[:rows], weight, part[:rows])
        equal.append(torch.equal(part[:rows], whole[:rows]))
    assert not all(equal)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "every second": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "a part": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "expanded": lambda x: x[:1].expand_as(x),
}


@backends
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides(backend: Backend, view: Callable[[Tensor], Tensor]) -> None:
    hidden, weight, bias, ids = make(6)
    hidden, weight = view(hidden), view(weight)
    found = run(backend, hidden, weight, bias, ids)
    compare(found, run("reference", hidden.double(), weight.double(), bias.double(), ids), 5e-6)


@backends
def test_batch_dimensions_and_int32(backend: Backend) -> None:
    hidden, weight, bias, ids = make(6)
    flat = run(backend, hidden, weight, bias, ids)
    shaped = run(backend, hidden.reshape(2, 3, H), weight, bias, ids.reshape(2, 3).int())
    for a, b in zip(shaped, flat, strict=True):
        assert torch.equal(a.reshape(b.shape), b)
    single = run(backend, hidden[0], weight, bias, ids[0])
    assert single[0].shape == ()
    assert single[2].shape == (H,)
    empty = run(backend, hidden[:0].reshape(2, 0, H), weight, bias, ids[:0].reshape(2, 0))
    assert [x.shape for x in empty] == [(2, 0), (2, 0), (2, 0, H), (V, H), (V,)]
    assert bool((empty[3] == 0).all())


def test_autocast_does_not_reach_the_head() -> None:
    hidden, weight, bias, ids = make(6)
    outside = run("cpp", hidden, weight, bias, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run("cpp", hidden, weight, bias, ids)
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """2048 rows: what is allocated at once, beyond the gradients, is at most 5% of the logits."""
    monkeypatch.undo()
    monkeypatch.setattr(_head_chunks, "PRODUCT_ELEMENTS", 64 * 500)  # a part of the vocabulary, as where it is large
    monkeypatch.setattr(_head_chunks, "CAST_ELEMENTS", 500 * 8)
    normal = Normals(0, dtype)
    hidden, weight, ids = normal(2048, 8).requires_grad_(), normal(5003, 8).requires_grad_(), torch.arange(2048)

    def step() -> None:
        logprobs, entropy = ops.linear_logprobs(hidden, weight, ids, return_entropy=True, backend="cpp")
        torch.autograd.grad((logprobs + entropy).sum(), (hidden, weight))

    gradients = 4 * (hidden.numel() + weight.numel())
    assert peak_bytes(step) <= 0.05 * 4 * 2048 * 5003 + 2 * gradients


@pytest.mark.parametrize(("backend", "softcap"), [("cpp", None), ("cpp", 2.0), ("triton", None)])
def test_opcheck(backend: Backend, softcap: float | None) -> None:
    """Schema, autograd registration, shapes without data, and tracing with unknown sizes."""
    hidden, weight, bias, ids = make(3)
    ids[1] = IGNORE
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    for return_entropy in (False, True):
        torch.library.opcheck(
            _forward, (*leaves[:2], ids, leaves[2], 0.8, softcap, 0.5, return_entropy, IGNORE, backend)
        )
    head = [x.detach() for x in leaves]
    _, entropy, stats = _forward(*head[:2], ids, head[2], 0.8, softcap, 0.5, True, IGNORE, backend)
    arguments = (*head[:2], ids, head[2], entropy, stats, 0.8, softcap, 0.5, IGNORE, backend)
    torch.library.opcheck(_backward, (torch.ones(3), None, *arguments, [True, False, True]))
    torch.library.opcheck(_backward, (torch.ones(3), torch.ones(3), *arguments, [False, True, False]))


@backends
def test_compiled_graph(backend: Backend) -> None:
    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
        logprobs, entropy = ops.linear_logprobs(
            hidden.sin(), weight, ids, bias=bias, softcap=3.0, return_entropy=True, backend=backend
        )
        return (logprobs - 0.1 * entropy).sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 8):
        hidden, weight, bias, ids = make(rows, seed=rows)
        leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
        eager, traced = (torch.autograd.grad(f(*leaves, ids), leaves) for f in (loss, compiled))
        for a, b in zip(traced, eager, strict=True):
            close(a, b, 1e-6)


def test_ids_out_of_range_in_triton() -> None:
    """What happens on a GPU, where nobody looks: NaN for that row alone."""
    hidden, weight, _, ids = make(5)
    ids[3] = V
    logprobs, entropy, _ = _forward(hidden, weight, ids, None, 1.0, None, 1.0, True, IGNORE, "triton")
    assert logprobs.isnan().tolist() == [False, False, False, True, False]
    assert bool(entropy.isfinite().all())


def test_triton_refuses_float64() -> None:
    hidden, weight, _, ids = make(2, torch.float64)
    with pytest.raises(TypeError, match="Triton takes float32, bfloat16 and float16"):
        ops.linear_logprobs(hidden, weight, ids, backend="triton")


def test_second_derivative_is_an_error() -> None:
    hidden, weight, _, ids = make(3)
    logprobs = ops.linear_logprobs(hidden.requires_grad_(), weight, ids, backend="cpp")
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
