"""Every op on a GPU against PyTorch eager and compiled, and Liger where it is installed, beside the floor."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.timing import CLOCK, time_gpu
from rlhf_fast import ops

pytestmark = [pytest.mark.gpu, pytest.mark.benchmark(timer=CLOCK)]

ROWS, VOCABULARY, WIDTH = 4096, 131_072, 4096  # tokens of a micro-batch, and the head of a model of 8B
BATCH, LENGTH = 256, 1024
FLOOR = "floor"

Run = Callable[[], object]


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, device="cuda", dtype=dtype)


def differentiated(loss: Callable[..., Tensor], *leaves: Tensor) -> Run:
    return lambda: torch.autograd.grad(loss(*leaves), leaves)


# ---- at the vocabulary ---------------------------------------------------------------------------------------------


def eager_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, ids[:, None])[:, 0]


def eager_ppo(logits: Tensor, ids: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    ratio = torch.exp(eager_logprobs(logits, ids) - old)
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean()


def vocabulary_case(rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = randn(rows, VOCABULARY, dtype=torch.bfloat16, scale=3).requires_grad_()
    ids = torch.randint(VOCABULARY, (rows,), device="cuda")
    return logits, ids, -randn(rows).abs(), randn(rows)


def read_floor(x: Tensor) -> Run:
    return lambda: x.detach().view(torch.int32).sum()


def copy_floor(x: Tensor) -> Run:
    target = torch.empty_like(x)
    return lambda: target.copy_(x.detach())


@pytest.mark.parametrize("name", ["rlhf_fast", "torch eager", "torch.compile", "floor: one read"])
def test_gather_logprobs_forward(benchmark: Any, name: str) -> None:
    benchmark.group, benchmark.param = f"gather_logprobs, forward, {ROWS}x{VOCABULARY} bfloat16", name
    logits, ids, _, _ = vocabulary_case()
    benchmark.extra_info["bytes"] = logits.nbytes
    runs: dict[str, Run] = {
        "rlhf_fast": lambda: ops.gather_logprobs(logits, ids),
        "torch eager": lambda: eager_logprobs(logits, ids),
        "torch.compile": lambda: compiled(eager_logprobs)(logits, ids),
        "floor: one read": read_floor(logits),
    }
    with torch.no_grad():
        time_gpu(benchmark, runs[name])


@pytest.mark.parametrize("name", ["rlhf_fast", "torch eager", "torch.compile", "floor: a read and a write"])
def test_logits_ppo_loss(benchmark: Any, name: str) -> None:
    benchmark.group, benchmark.param = f"logits_ppo_loss, loss and gradient, {ROWS}x{VOCABULARY} bfloat16", name
    logits, ids, old, advantages = vocabulary_case()
    mask = torch.ones(1, ROWS, dtype=torch.bool, device="cuda")
    benchmark.extra_info["bytes"] = 2 * logits.nbytes
    given = (ids, old, advantages)

    def ours(x: Tensor) -> Tensor:
        return ops.logits_ppo_loss(x[None], ids[None], old[None], advantages[None], mask).policy_loss

    runs: dict[str, Run] = {
        "rlhf_fast": differentiated(ours, logits),
        "torch eager": differentiated(lambda x: eager_ppo(x, *given), logits),
        "torch.compile": differentiated(lambda x: compiled(eager_ppo)(x, *given), logits),
        "floor: a read and a write": copy_floor(logits),
    }
    time_gpu(benchmark, runs[name], rounds=10, calls=3)


# ---- from hidden states --------------------------------------------------------------------------------------------


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if function not in _COMPILED:
        _COMPILED[function] = torch.compile(function)
    return _COMPILED[function]


_COMPILED: dict[Callable[..., Tensor], Callable[..., Tensor]] = {}
LIGER = importlib.util.find_spec("liger_kernel") is not None


def three_products(hidden: Tensor, weight: Tensor) -> Run:
    def run() -> None:
        logits = F.linear(hidden, weight)
        torch.mm(logits, weight)
        torch.mm(logits.T, hidden)

    return run


def liger(hidden: Tensor, weight: Tensor, ids: Tensor) -> Callable[..., Tensor]:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return lambda h, w: LigerFusedLinearCrossEntropyFunction.apply(h, w, ids)[0]


LINEAR = [
    (op, name)
    for op in ("linear_ppo_loss", "linear_cross_entropy", "linear_logprobs")
    for name in ("rlhf_fast", "torch eager, all logits", "floor: three products")
]


@pytest.mark.parametrize(("op", "name"), [*LINEAR, *([("linear_cross_entropy", "Liger")] if LIGER else [])])
def test_linear(benchmark: Any, op: str, name: str) -> None:
    """Loss and gradients of hidden states and head. Liger has the cross-entropy alone."""
    benchmark.group, benchmark.param = f"{op}, loss and gradients, {ROWS}x{WIDTH}x{VOCABULARY} bfloat16", name
    hidden = randn(ROWS, WIDTH, dtype=torch.bfloat16).requires_grad_()
    weight = randn(VOCABULARY, WIDTH, dtype=torch.bfloat16, scale=WIDTH**-0.5).requires_grad_()
    ids = torch.randint(VOCABULARY, (ROWS,), device="cuda")
    old, advantages = -randn(ROWS).abs(), randn(ROWS)
    mask = torch.ones(ROWS, dtype=torch.bool, device="cuda")
    ours: dict[str, Callable[..., Tensor]] = {
        "linear_ppo_loss": lambda h, w: (
            ops.linear_ppo_loss(h[None], w, ids[None], old[None], advantages[None], mask[None]).policy_loss
        ),
        "linear_cross_entropy": lambda h, w: ops.linear_cross_entropy(h, w, ids, mask).loss,
        "linear_logprobs": lambda h, w: ops.linear_logprobs(h, w, ids).sum(),
    }
    eager: dict[str, Callable[..., Tensor]] = {
        "linear_ppo_loss": lambda h, w: eager_ppo(F.linear(h, w), ids, old, advantages),
        "linear_cross_entropy": lambda h, w: F.cross_entropy(F.linear(h, w).float(), ids),
        "linear_logprobs": lambda h, w: eager_logprobs(F.linear(h, w), ids).sum(),
    }
    with torch.no_grad():
        floor = three_products(hidden, weight)
    runs: dict[str, Callable[[], Run]] = {
        "rlhf_fast": lambda: differentiated(ours[op], hidden, weight),
        "torch eager, all logits": lambda: differentiated(eager[op], hidden, weight),
        "Liger": lambda: differentiated(liger(hidden, weight, ids), hidden, weight),
        "floor: three products": lambda: torch.no_grad()(floor),
    }
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runs[name]()()
    benchmark.extra_info["memory"] = torch.cuda.max_memory_allocated() - before
    time_gpu(benchmark, runs[name](), rounds=5, calls=1)


# ---- per token -----------------------------------------------------------------------------------------------------


def gae_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """The loop of DeepSpeed-Chat and TRL: a step a token."""
    last, found = torch.zeros_like(rewards[:, 0]), []
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        last = rewards[:, t] + following - values[:, t] + 0.95 * last
        found.append(last)
    return torch.stack(found[::-1], dim=1)


def eager_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = torch.exp(logprobs - old)
    loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    return (loss * mask).sum() / mask.sum()


def eager_value(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    clipped = old + (values - old).clamp(-0.2, 0.2)
    return 0.5 * (torch.max((values - returns) ** 2, (clipped - returns) ** 2) * mask).sum() / mask.sum()


def eager_whiten(x: Tensor, mask: Tensor) -> Tensor:
    mean = (x * mask).sum() / mask.sum()
    variance = ((x - mean) ** 2 * mask).sum() / mask.sum()
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


PER_TOKEN = [
    (op, name)
    for op in ("gae", "shaped_gae", "ppo_loss", "value_loss", "masked_whiten")
    for name in ("rlhf_fast", "torch eager", "torch.compile", "floor: inputs read, outputs written")
    if not ("gae" in op and name == "torch.compile")  # a loop of 1,024 steps: minutes
]


@pytest.mark.parametrize(("op", "name"), PER_TOKEN)
def test_per_token(benchmark: Any, op: str, name: str) -> None:
    benchmark.group, benchmark.param = f"{op}, {BATCH}x{LENGTH} float32", name
    a, b, c = (randn(BATCH, LENGTH) for _ in range(3))
    mask, scores = torch.ones(BATCH, LENGTH, dtype=torch.bool, device="cuda"), randn(BATCH)
    leaf = a.clone().requires_grad_()
    ours: dict[str, Run] = {
        "gae": lambda: ops.gae(a, b, mask),
        "shaped_gae": lambda: ops.shaped_gae(scores, a, b, c, mask, kl_coef=0.1),
        "ppo_loss": differentiated(lambda x: ops.ppo_loss(x, b, c, mask).policy_loss, leaf),
        "value_loss": differentiated(lambda x: ops.value_loss(x, b, c, mask).loss, leaf),
        "masked_whiten": lambda: ops.masked_whiten(a, mask),
    }
    peers: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "gae": (gae_loop, (a, b, mask)),
        "shaped_gae": (lambda x, r, v, m: gae_loop(-0.1 * (x - r), v, m), (a, b, c, mask)),
        "ppo_loss": (eager_loss, (leaf, b, c, mask)),
        "value_loss": (eager_value, (leaf, b, c, mask)),
        "masked_whiten": (eager_whiten, (a, mask)),
    }
    if name == "rlhf_fast":
        return time_gpu(benchmark, ours[op])
    if name.startswith(FLOOR):
        inputs, outputs = {"gae": (2, 2), "shaped_gae": (3, 3), "masked_whiten": (1, 1)}.get(op, (3, 1))
        many = torch.empty((inputs + outputs) // 2, BATCH, LENGTH, device="cuda")
        return time_gpu(benchmark, copy_floor(many))
    function, given = peers[op]
    if name == "torch.compile":
        function = torch.compile(function)
    if op.endswith("_loss"):
        rest = given[1:]
        return time_gpu(benchmark, differentiated(lambda x: function(x, *rest), leaf))
    return time_gpu(benchmark, lambda: function(*given), calls=1 if "gae" in op else 10)
