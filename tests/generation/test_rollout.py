"""Rollout: the tensors that training starts from."""

from __future__ import annotations

import torch

from rlhf_fast.generation import Rollout


def example() -> Rollout:
    mask = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    tokens = torch.tensor([[7, 8, 0], [4, 5, 6], [0, 0, 0]])
    numbers = torch.tensor([[-1.0, -2.0, 0.0], [-3.0, -4.0, -5.0], [0.0, 0.0, 0.0]])
    return Rollout([[1, 2, 3], [9], [2, 2]], tokens, mask, numbers, numbers - 1, ["stop", "length", "abort"])


def test_sequences_hold_prompt_and_response_and_say_what_predicts_each_token() -> None:
    input_ids, rows, positions, ids = example().sequences(pad_id=99)
    assert input_ids.tolist() == [[1, 2, 3, 7, 8], [9, 4, 5, 6, 99], [2, 2, 99, 99, 99]]
    assert rows.tolist() == [0, 0, 1, 1, 1]
    assert positions.tolist() == [2, 3, 0, 1, 2]
    assert ids.tolist() == [7, 8, 4, 5, 6]
    assert torch.equal(input_ids[rows, positions + 1], ids)


def test_scatter_is_the_way_back_with_gradient() -> None:
    rollout = example()
    assert torch.equal(rollout.scatter(rollout.logprobs[rollout.mask]), rollout.logprobs)
    flat = torch.zeros(5, requires_grad=True)
    (rollout.scatter(flat) * torch.arange(9.0).reshape(3, 3)).sum().backward()
    assert flat.grad is not None
    assert flat.grad.tolist() == [0, 1, 3, 4, 5]


def test_select_takes_rows_and_keeps_the_width() -> None:
    chosen = example().select([2, 0])
    assert chosen.prompt_ids == [[2, 2], [1, 2, 3]]
    assert chosen.tokens.tolist() == [[0, 0, 0], [7, 8, 0]]
    assert chosen.finish_reasons == ["abort", "stop"]
    assert chosen.finished.tolist() == [False, True]
    assert chosen.lengths.tolist() == [0, 2]
    assert torch.equal(example().select(torch.tensor([1])).sampled_logprobs, example().sampled_logprobs[1:2])


def test_no_rows() -> None:
    none = example().select([])
    input_ids, rows, positions, ids = none.sequences(0)
    assert input_ids.shape[0] == len(rows) == len(positions) == len(ids) == 0
