"""Wrong arguments: each has a message that names the op, the argument, what was given and what was wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.ops._dispatch import choose_backend

B, T, V, H = 2, 3, 5, 4
x, x_short, per_row = torch.zeros(B, T), torch.zeros(B, T - 1), torch.zeros(B)
mask, ids = torch.ones(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.int64)
logits, hidden, weight = torch.zeros(B, T, V), torch.zeros(B, T, H), torch.zeros(V, H)
elsewhere = torch.zeros(B, T, device="meta")

RIGHT: dict[str, dict[str, Any]] = {
    "gather_logprobs": {"logits": logits, "ids": ids},
    "linear_logprobs": {"hidden": hidden, "weight": weight, "ids": ids},
    "linear_cross_entropy": {"hidden": hidden, "weight": weight, "ids": ids, "mask": mask},
    "gae": {"rewards": x, "values": x, "mask": mask},
    "shaped_gae": {"scores": per_row, "logprobs": x, "ref_logprobs": x, "values": x, "mask": mask, "kl_coef": 0.1},
    "masked_whiten": {"x": x, "mask": mask},
    "value_loss": {"values": x, "old_values": x, "returns": x, "mask": mask},
    "ppo_loss": {"logprobs": x, "old_logprobs": x, "advantages": x, "mask": mask},
    "logits_ppo_loss": {"logits": logits, "ids": ids, "old_logprobs": x, "advantages": x, "mask": mask},
    "linear_ppo_loss": {
        "hidden": hidden, "weight": weight, "ids": ids, "old_logprobs": x, "advantages": x, "mask": mask,
    },
}  # fmt: skip


def call(op: str, **wrong: Any) -> Any:
    function: Callable[..., Any] = getattr(ops, op)
    return function(**RIGHT[op] | wrong)


@pytest.mark.parametrize("op", RIGHT)
def test_the_right_arguments_are_right(op: str) -> None:
    """Else the tests below could pass for another reason."""
    call(op)


# op, the wrong arguments, what the ValueError says
VALUES: list[tuple[str, dict[str, Any], str]] = [
    ("gather_logprobs", {"ids": ids[:, :2]}, "ids must have shape [2, 3], logits' without V; got [2, 2]"),
    ("gather_logprobs", {"logits": torch.zeros(B, T, 0)}, "logits must have shape [..., V] with V > 0; got [2, 3, 0]"),
    ("gather_logprobs", {"logits": torch.zeros(())}, "logits must have shape [..., V] with V > 0; got []"),
    ("gather_logprobs", {"temperature": 0.0}, "temperature must be above 0 and finite; got 0.0"),
    ("gather_logprobs", {"temperature": -1}, "temperature must be above 0 and finite; got -1"),
    ("gather_logprobs", {"temperature": math.nan}, "temperature must be above 0 and finite; got nan"),
    ("gather_logprobs", {"temperature": math.inf}, "temperature must be above 0 and finite; got inf"),
    ("gather_logprobs", {"ids": ids + V}, "ids must be from 0 to 4, unless equal to ignore_index (-100); got 5 "),
    ("gather_logprobs", {"ids": ids.to("meta")}, "ids must be on cpu like the other arguments; got meta"),
    ("gather_logprobs", {"backend": "cuda"}, "backend must be one of 'auto', 'triton', 'cpp', 'reference'; got 'cuda'"),
    ("linear_logprobs", {"weight": torch.zeros(V, H + 1)}, "hidden must have shape [2, 3, 5], H as in weight [5, 5]"),
    ("linear_logprobs", {"weight": per_row}, "weight must have shape [V, H] with V > 0; got [2]"),
    ("linear_logprobs", {"bias": per_row}, "bias must have shape [5], V as in weight; got [2]"),
    ("linear_logprobs", {"softcap": 0.0}, "softcap must be above 0 and finite; got 0.0"),
    ("linear_logprobs", {"ids": ids - 1}, "ids must be from 0 to 4"),
    ("linear_logprobs", {"ids": ids[0]}, "ids must have shape [2, 3], hidden's without H; got [3]"),
    ("linear_logprobs", {"temperature": 0.0}, "temperature must be above 0 and finite; got 0.0"),
    ("linear_cross_entropy", {"mask": mask[0]}, "hidden must have shape [3, 4], mask's and weight's H; got [2, 3, 4]"),
    ("linear_cross_entropy", {"ids": ids + V}, "ids must be from 0 to 4, unless masked out; got 5 at [0, 0]"),
    (
        "linear_cross_entropy",
        {"weights": per_row},
        "weights must have shape [2, 3], like mask, or 1 in place of a size",
    ),
    ("linear_cross_entropy", {"bias": per_row}, "bias must have shape [5], V as in weight; got [2]"),
    ("linear_cross_entropy", {"num_tokens": 0}, "num_tokens must be above 0 and finite; got 0"),
    ("gae", {"values": x_short}, "values must have shape [2, 3], like mask; got [2, 2]"),
    ("gae", {"rewards": elsewhere}, "rewards must be on cpu like the other arguments; got meta"),
    ("gae", {"mask": mask[0]}, "mask must have shape [B, T]; got [3]"),
    ("gae", {"last_values": x}, "last_values must have shape [2], one for each row of mask; got [2, 3]"),
    ("gae", {"gamma": 1.5}, "gamma must be at least 0 and at most 1; got 1.5"),
    ("gae", {"lam": -0.1}, "lam must be at least 0 and at most 1; got -0.1"),
    ("shaped_gae", {"scores": x}, "scores must have shape [2], one for each row of mask; got [2, 3]"),
    ("shaped_gae", {"ref_logprobs": x_short}, "ref_logprobs must have shape [2, 3], like mask; got [2, 2]"),
    ("shaped_gae", {"ref_logprobs": None}, "kl_coef 0.1 needs ref_logprobs, which is None"),
    ("shaped_gae", {"kl_coef": -0.1}, "kl_coef must be at least 0 and finite; got -0.1"),
    ("shaped_gae", {"kl_estimator": "k4"}, "kl_estimator must be one of k1, k2, k3; got 'k4'"),
    ("shaped_gae", {"clip_score": 0}, "clip_score must be above 0; got 0"),
    ("masked_whiten", {"x": x_short}, "x must have shape [2, 3], like mask; got [2, 2]"),
    ("masked_whiten", {"eps": -1e-8}, "eps must be at least 0 and finite; got -1e-08"),
    ("value_loss", {"old_values": x_short}, "old_values must have shape [2, 3], like mask; got [2, 2]"),
    ("value_loss", {"cliprange_value": -0.2}, "cliprange_value must be at least 0; got -0.2"),
    ("value_loss", {"num_tokens": 0}, "num_tokens must be above 0 and finite; got 0"),
    ("value_loss", {"num_tokens": per_row}, "num_tokens must have one element; got shape [2]"),
    ("ppo_loss", {"logprobs": x_short}, "logprobs must have shape [2, 3], like mask; got [2, 2]"),
    ("ppo_loss", {"advantages": per_row}, "advantages must have shape [2, 3], like mask; got [2]"),
    ("ppo_loss", {"old_logprobs": elsewhere}, "old_logprobs must be on cpu like the other arguments; got meta"),
    ("ppo_loss", {"cliprange": -0.1}, "cliprange must be at least 0; got -0.1"),
    ("ppo_loss", {"cliprange_high": math.nan}, "cliprange_high must be at least 0; got nan"),
    ("ppo_loss", {"dual_clip": 1.0}, "dual_clip must be above 1; got 1.0"),
    ("ppo_loss", {"weights": per_row}, "weights must have shape [2, 3], like mask, or 1 in place of a size; got [2]"),
    ("ppo_loss", {"weights": torch.zeros(3, 1)}, "weights must have shape [2, 3], like mask, or 1 in place of a size"),
    ("ppo_loss", {"kl_coef": 0.1}, "kl_coef 0.1 needs ref_logprobs, which is None"),
    ("ppo_loss", {"entropy_coef": 0.1}, "entropy_coef 0.1 needs entropy, which is None"),
    ("ppo_loss", {"values": x}, "values, old_values and returns go together; old_values and returns missing"),
    ("ppo_loss", {"values": x, "old_values": x, "returns": x_short}, "returns must have shape [2, 3], like mask"),
    ("ppo_loss", {"kl_estimator": "kl"}, "kl_estimator must be one of k1, k2, k3; got 'kl'"),
    ("ppo_loss", {"num_tokens": -3}, "num_tokens must be above 0 and finite; got -3"),
    ("logits_ppo_loss", {"logits": logits[:, :2]}, "logits must have shape [2, 3, 5], mask's and V; got [2, 2, 5]"),
    ("logits_ppo_loss", {"ids": ids[0]}, "ids must have shape [2, 3], like mask; got [3]"),
    ("logits_ppo_loss", {"ids": ids + V}, "ids must be from 0 to 4, unless masked out; got 5 at [0, 0] (6 such ids)"),
    ("logits_ppo_loss", {"temperature": 0.0}, "temperature must be above 0 and finite; got 0.0"),
    ("linear_ppo_loss", {"hidden": hidden[0]}, "hidden must have shape [2, 3, 4], mask's and weight's H; got [3, 4]"),
    ("linear_ppo_loss", {"ids": ids - 1}, "ids must be from 0 to 4, unless masked out; got -1 at [0, 0]"),
    ("linear_ppo_loss", {"bias": per_row}, "bias must have shape [5], V as in weight; got [2]"),
]
VALUES += [
    (op, {"kl_estimator": "k1"}, "kl_estimator 'k1' has an expected gradient of zero in a loss; use 'k2' or 'k3'")
    for op in ("ppo_loss", "logits_ppo_loss", "linear_ppo_loss")
]

# The head's numbers, on every backend: what divides by them, or is divided, must be a number.
HEADS = ("linear_logprobs", "linear_cross_entropy", "linear_ppo_loss")
VALUES += [
    (op, {name: value, "backend": backend}, f"{name} must be above 0 and finite; got {value!r}")
    for op in HEADS
    for name in ("temperature", "softcap", "scale")
    for value in (0.0, -1.0, math.nan, math.inf)
    for backend in ("cpp", "triton", "reference")
    if (op, name) != ("linear_cross_entropy", "temperature")  # it has none
]
VALUES += [
    (op, {"entropy_coef": value}, f"entropy_coef must be finite; got {value!r}")
    for op in ("ppo_loss", "logits_ppo_loss", "linear_ppo_loss")
    for value in (math.nan, -math.inf)
]

# op, the wrong arguments, what the TypeError says
TYPES: list[tuple[str, dict[str, Any], str]] = [
    ("gather_logprobs", {"logits": logits.long()}, "logits must hold floating-point numbers; got torch.int64"),
    ("gather_logprobs", {"logits": logits.tolist()}, "logits must be a tensor; got list"),
    ("gather_logprobs", {"ids": ids.float()}, "ids must be int64 or int32; got torch.float32"),
    ("gather_logprobs", {"ids": 0}, "ids must be a tensor; got int"),
    ("gather_logprobs", {"temperature": "1"}, "temperature must be a number; got str"),
    ("gather_logprobs", {"temperature": torch.tensor(1.0)}, "temperature must be a number; got Tensor"),
    ("linear_logprobs", {"weight": weight.long()}, "weight must hold floating-point numbers; got torch.int64"),
    ("linear_cross_entropy", {"mask": mask.long()}, "mask must be bool; got torch.int64"),
    ("linear_cross_entropy", {"hidden": hidden.long()}, "hidden must hold floating-point numbers; got torch.int64"),
    ("gae", {"mask": mask.float()}, "mask must be bool; got torch.float32 (mask.bool() if it holds 0 and 1)"),
    ("gae", {"mask": [[True]]}, "mask must be a tensor; got list"),
    ("gae", {"rewards": x.long()}, "rewards must hold floating-point numbers; got torch.int64"),
    ("gae", {"gamma": True}, "gamma must be a number; got bool"),
    ("shaped_gae", {"scores": [1.0, 2.0]}, "scores must be a tensor; got list"),
    ("shaped_gae", {"mask": mask.long()}, "mask must be bool; got torch.int64"),
    ("masked_whiten", {"mask": mask.long()}, "mask must be bool; got torch.int64"),
    ("value_loss", {"num_tokens": "3"}, "num_tokens must be a number; got str"),
    ("value_loss", {"mask": mask.int()}, "mask must be bool; got torch.int32"),
    ("ppo_loss", {"mask": mask.half()}, "mask must be bool; got torch.float16"),
    ("ppo_loss", {"weights": ids}, "weights must hold floating-point numbers; got torch.int64"),
    ("logits_ppo_loss", {"ids": ids.bool()}, "ids must be int64 or int32; got torch.bool"),
    ("linear_ppo_loss", {"mask": None}, "mask must be a tensor; got NoneType"),
]


@pytest.mark.parametrize(("op", "wrong", "says"), VALUES)
def test_values(op: str, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match="^" + op) as raised:
        call(op, **wrong)
    assert says in str(raised.value)


@pytest.mark.parametrize(("op", "wrong", "says"), TYPES)
def test_types(op: str, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match="^" + op) as raised:
        call(op, **wrong)
    assert says in str(raised.value)


def test_infinity_limits_nothing() -> None:
    limits = {"cliprange": math.inf, "cliprange_high": math.inf, "dual_clip": math.inf}
    ratios = torch.tensor([[0.1, 3.0, -2.0], [1.0, -0.5, 4.0]])
    found = call("ppo_loss", logprobs=ratios, advantages=x - 1, **limits)
    assert found.policy_loss == pytest.approx(float(ratios.exp().mean()))
    assert found.stats["clip_fraction"] == 0
    assert (
        call("value_loss", values=ratios, cliprange_value=math.inf).loss
        == call("value_loss", values=ratios, cliprange_value=None).loss
    )
    assert call("shaped_gae", scores=per_row + 9, clip_score=math.inf)[2].sum() == 18


@pytest.mark.parametrize(
    ("device", "dtype", "chosen"),
    [
        ("cuda", torch.float32, "triton"),
        ("cuda", torch.bfloat16, "triton"),
        ("cuda", torch.float64, "reference"),
        ("cpu", torch.float32, "cpp"),
        ("cpu", torch.float64, "cpp"),
        ("mps", torch.float32, "reference"),
    ],
)
def test_auto_takes_the_fastest_of_the_device(device: str, dtype: torch.dtype, chosen: str) -> None:
    assert choose_backend("op", "auto", torch.device(device), dtype) == chosen


def test_a_backend_of_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="op: backend 'triton' is for tensors on a GPU; these are on cpu"):
        choose_backend("op", "triton", torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="op: backend 'cpp' is for tensors on a CPU; these are on cuda:1"):
        choose_backend("op", "cpp", torch.device("cuda:1"), torch.float32)
    assert choose_backend("op", "reference", torch.device("cuda:1"), torch.float32) == "reference"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("op", "triton", torch.device("cpu"), torch.float32) == "triton"
