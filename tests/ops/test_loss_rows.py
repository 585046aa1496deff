"""The operators that turn rows of logits into the gradient of their loss, PPO's and cross-entropy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rlhf_fast import ops
from rlhf_fast.ops import Backend
from rlhf_fast.ops._dispatch import Implementation, load_compiled_ops
from rlhf_fast.ops._loss_rows import cross_entropy_rows_, ppo_rows_, ppo_summary
from tests.ops.logits_loss_cases import ALL, backends, from_a_head, tokens
from tests.ops.op_cases import close
from tests.ops.test_gather_logprobs_backends import DTYPES, ROUNDING, flat, likely_ids, make

# numpy's remarks on inf - inf in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


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
