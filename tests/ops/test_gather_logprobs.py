"""gather_logprobs: every backend against a loop over rows in Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops import Backend
from tests.ops.op_cases import Normals, close, seeds

IGNORE = -100
BACKENDS: list[Backend] = ["reference", "cpp"]
backends = pytest.mark.parametrize("backend", BACKENDS)


def by_definition(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Rows [N, V], one at a time: log p = z - log sum exp z, entropy = -sum p log p over p > 0."""
    logprobs, entropies = [], []
    for row, chosen in zip(logits.tolist(), ids.tolist(), strict=True):
        if chosen == IGNORE:
            logprobs.append(0.0)
            entropies.append(0.0)
            continue
        z = [x / temperature for x in row]
        top = max(z)
        log_sum = top + math.log(math.fsum(math.exp(x - top) for x in z))
        log_p = [x - log_sum for x in z]
        logprobs.append(log_p[chosen])
        entropies.append(-math.fsum(math.exp(x) * x for x in log_p if x > -math.inf))
    return torch.tensor(logprobs, dtype=torch.float64), torch.tensor(entropies, dtype=torch.float64)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """logits [N, V] float64, some of them -inf, and ids [N], some ignored; no chosen token has probability 0."""
    rows, vocabulary, seed = draw(st.integers(1, 5)), draw(st.integers(1, 40)), draw(seeds)
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    ids = torch.randint(vocabulary, (rows,), generator=generator)
    barred = torch.rand(rows, vocabulary, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    logits[barred.scatter(1, ids[:, None], False)] = -torch.inf
    ids[torch.rand(rows, generator=generator) < 0.2] = IGNORE
    return logits, ids


@backends
@settings(max_examples=60, deadline=None)
@given(case=cases(), temperature=st.sampled_from([0.5, 1.0, 1.7]))
def test_definition(backend: Backend, case: tuple[Tensor, Tensor], temperature: float) -> None:
    logits, ids = case
    logits[ids == IGNORE] = torch.nan
    logprobs, entropy = ops.gather_logprobs(logits, ids, temperature=temperature, return_entropy=True, backend=backend)
    expected = by_definition(logits, ids, temperature)
    close(logprobs, expected[0])
    close(entropy, expected[1])
    assert torch.equal(ops.gather_logprobs(logits, ids, temperature=temperature, backend=backend), logprobs)


@backends
@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_gradients(backend: Backend, case: tuple[Tensor, Tensor]) -> None:
    """With tokens of probability 0: the finite logits by finite differences, the others exactly 0."""
    logits, ids = case
    finite = logits.isfinite()

    def run(numbers: Tensor) -> tuple[Tensor, Tensor]:
        full = logits.masked_scatter(finite, numbers)
        return ops.gather_logprobs(full, ids, temperature=0.7, return_entropy=True, backend=backend)

    assert torch.autograd.gradcheck(run, [logits[finite].requires_grad_()])

    logits[ids == IGNORE] = torch.nan
    leaf = logits.requires_grad_()
    logprobs, entropy = ops.gather_logprobs(leaf, ids, return_entropy=True, backend=backend)
    (gradient,) = torch.autograd.grad((logprobs + 2 * entropy).sum(), leaf)
    assert gradient.isfinite().all()
    assert bool((gradient[~logits.isfinite()] == 0).all())


@backends
def test_certain_and_impossible_tokens(backend: Backend) -> None:
    """One token has all the probability, and the entropy is exactly 0 with a gradient of exactly 0."""
    logits = torch.tensor([[0.0, -torch.inf, -torch.inf], [0.0, -torch.inf, 0.0]], requires_grad=True)
    logprobs, entropy = ops.gather_logprobs(logits, torch.tensor([0, 1]), return_entropy=True, backend=backend)
    assert logprobs.tolist() == [0.0, -math.inf]
    assert entropy.tolist() == pytest.approx([0.0, math.log(2)])
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
def test_dtypes(backend: Backend, dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
    logits = 5 * Normals(0, dtype)(3, 4, 33)
    logits.requires_grad_()
    ids = torch.randint(33, (3, 4), generator=torch.Generator().manual_seed(0)).to(ids_dtype)
    logprobs, entropy = ops.gather_logprobs(logits, ids, return_entropy=True, backend=backend)
    assert logprobs.dtype == entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert logprobs.shape == entropy.shape == (3, 4)
    exact = by_definition(logits.detach().double().reshape(-1, 33), ids.reshape(-1), 1.0)
    close(logprobs.detach().double().reshape(-1), exact[0], 1e-5)
    close(entropy.detach().double().reshape(-1), exact[1], 1e-5)
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits)
    assert gradient.dtype == dtype


@backends
def test_large_logits(backend: Backend) -> None:
    logits = torch.tensor([[1e4, 1e4 - 3, -1e4], [-1e4, -1e4, -1e4]])
    logprobs, entropy = ops.gather_logprobs(logits, torch.tensor([1, 2]), return_entropy=True, backend=backend)
    expected = by_definition(logits, torch.tensor([1, 2]), 1.0)
    close(logprobs.double(), expected[0], 1e-5)
    close(entropy.double(), expected[1], 1e-5)


@backends
def test_strides(backend: Backend) -> None:
    wide = Normals(1, torch.float32)(6, 4, 20)
    ids = torch.randint(10, (6, 4), generator=torch.Generator().manual_seed(1))
    for view, view_ids in [
        (wide[..., :10], ids),  # rows with a gap
        (wide[..., ::2], ids),  # every second logit
        (wide.transpose(0, 1)[..., 5:15], ids.T),
        (wide[:1, :, :10].expand(6, 4, 10), ids),  # one row many times
    ]:
        leaf, plain_leaf = view.detach().requires_grad_(), view.contiguous().requires_grad_()
        strided = ops.gather_logprobs(leaf, view_ids, return_entropy=True, backend=backend)
        plain = ops.gather_logprobs(plain_leaf, view_ids.contiguous(), return_entropy=True, backend=backend)
        close(strided[0], plain[0], 1e-6)
        close(strided[1], plain[1], 1e-6)
        gradients = [torch.autograd.grad((a + b).sum(), x) for (a, b), x in ((strided, leaf), (plain, plain_leaf))]
        close(gradients[0][0], gradients[1][0], 1e-6)


@backends
def test_any_ignore_index(backend: Backend) -> None:
    logits = Normals(2)(3, 5)
    found = ops.gather_logprobs(logits, torch.tensor([0, 3, 0]), ignore_index=0, backend=backend)
    assert float(found[0]) == float(found[2]) == 0.0
    close(found[1], torch.log_softmax(logits, -1)[1, 3])


@backends
@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_no_rows_and_a_single_one(backend: Backend, shape: tuple[int, ...]) -> None:
    logits, ids = torch.zeros(*shape, 4, requires_grad=True), torch.zeros(shape, dtype=torch.int64)
    logprobs, entropy = ops.gather_logprobs(logits, ids, return_entropy=True, backend=backend)
    close(logprobs, torch.full(shape, -math.log(4)), 1e-6)
    close(entropy, torch.full(shape, math.log(4)), 1e-6)
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape


@backends
def test_inplace_backward_gives_the_same_gradient(backend: Backend) -> None:
    ids, source = torch.tensor([1, IGNORE, 3]), Normals(3, torch.float32)(3, 6)
    gradients = []
    for inplace in (False, True):
        leaf = source.clone().requires_grad_()
        logits = 2 * leaf  # what a head makes: a tensor that its own backward does not read
        logprobs, entropy = ops.gather_logprobs(
            logits, ids, return_entropy=True, inplace_backward=inplace, backend=backend
        )
        gradients += torch.autograd.grad((logprobs - 0.1 * entropy).sum(), leaf)
    close(gradients[1], gradients[0], 1e-6)


@backends
@pytest.mark.parametrize("bad", [-1, 5, -101, 2**40])
def test_ids_out_of_range(backend: Backend, bad: int) -> None:
    with pytest.raises(ValueError, match=rf"ids must be from 0 to 4.*ignore_index.*got {bad} (at \[1, 0\]|in row 1)"):
        ops.gather_logprobs(torch.zeros(2, 1, 5), torch.tensor([[0], [bad]]), backend=backend)


def test_the_reference_gives_nan_for_ids_out_of_range() -> None:
    """What happens on a GPU, where nobody looks."""
    found = ops.reference.gather_logprobs(torch.zeros(3, 5), torch.tensor([-1, 5, 4]))
    assert isinstance(found, Tensor)
    assert found.isnan().tolist() == [True, True, False]
