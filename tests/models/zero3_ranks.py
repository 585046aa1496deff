"""Run by test_zero3.py under torchrun on two ranks: ZeRO-3 gives each model's plain outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import rlhf_fast.engine
from rlhf_fast.config import SFTConfig
from rlhf_fast.engine import Engine, World, init_distributed
from rlhf_fast.models import PolicyModel, ScalarModel, SharedModel, SplitWeights, head, set_gradient_checkpointing
from tests.families import VOCABULARY, tiny_config, tiny_model

ROWS, LENGTH = 4, 10


def tied() -> nn.Module:
    model = tiny_model("qwen2")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return PolicyModel(model)


def shared() -> nn.Module:
    return SharedModel(tiny_model("llama"))


def scalar() -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    config = tiny_config("llama")
    config.num_labels = 1
    torch.manual_seed(0)
    return ScalarModel(AutoModelForSequenceClassification.from_config(config))


def outputs(model: Any, row: Tensor, inner: nn.Module) -> Tensor:
    """All that the module says about one sequence [1, L], as one vector: for a SharedModel PPO's loss and values."""
    positions = torch.arange(LENGTH - 1)
    places = (torch.zeros_like(positions), positions)
    if isinstance(inner, ScalarModel):
        return model(row, *places)
    if isinstance(inner, PolicyModel):
        return torch.cat(model(row, *places, row[0, 1:]))
    old, mask = torch.linspace(-6, -4, LENGTH - 1), positions != 2
    loss, values = model(row, *places, row[0, 1:], old_logprobs=old, advantages=old + 5, mask=mask, num_tokens=2)
    return torch.cat([loss.policy_loss[None], values])


def check(make: Callable[[], nn.Module], world: World, *, checkpointing: bool, logits_bytes: int) -> None:
    head.LOGITS_BYTES = logits_bytes
    plain, trained = make(), make()
    for model in (plain, trained):
        model.train()
        set_gradient_checkpointing(model, checkpointing)
    config = SFTConfig(model_name_or_path="-", train_data="-", zero_stage=3, learning_rate=0.0, max_grad_norm=0.0)
    engine = Engine(trained, config=config, world=world, total_steps=2)
    if world.world_size > 1:
        check_memory(engine, plain)
    for step in range(2):
        batch = torch.randint(2, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
        wanted = [outputs(plain, row[None], plain) for row in batch]
        plain.zero_grad()
        torch.stack(wanted).square().sum().backward()
        norm = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm()
        mine = range(world.rank, ROWS, world.world_size)
        for row in mine:
            got = outputs(engine, batch[row][None], plain)
            torch.testing.assert_close(got, wanted[row], rtol=0, atol=1e-5)
            engine.backward(got.square().sum(), last=row == mine[-1])
        torch.testing.assert_close(engine.step().grad_norm, float(norm), rtol=1e-5, atol=0)


def check_split(world: World) -> None:
    """A frozen model that is split over the ranks: nothing of it outside, all of it inside, asked unequally often."""
    plain, model = tiny_model("llama"), tiny_model("llama")
    row = torch.arange(2, 2 + LENGTH)[None]
    split = SplitWeights(model, world)
    assert sum(p.untyped_storage().nbytes() for p in model.parameters()) == 0
    for _ in range(2):
        with split.gathered(), torch.inference_mode():
            for _ in range(world.rank):
                assert torch.equal(model(row).logits, plain(row).logits)
        assert sum(p.untyped_storage().nbytes() for p in model.parameters()) == 0


def check_memory(engine: Engine, plain: nn.Module) -> None:
    """Whole weights while they are gathered, and none of them afterwards."""
    assert held(engine) == 0
    with engine.gathered():
        for mine, theirs in zip(engine.module.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    assert held(engine) == 0


def held(engine: Engine) -> int:
    """Bytes behind the parameters on this rank, besides its own part."""
    return sum(p.untyped_storage().nbytes() for p in engine.module.parameters())


if __name__ == "__main__":
    rlhf_fast.engine.PERSISTENT = 0  # else all of these small weights stay whole, and nothing is tried
    ranks = init_distributed("cpu")
    if ranks.world_size > 1:
        check_split(ranks)
    check(tied, ranks, checkpointing=True, logits_bytes=0)
    check(shared, ranks, checkpointing=False, logits_bytes=2**30)
    check(shared, ranks, checkpointing=True, logits_bytes=0)
    check(scalar, ranks, checkpointing=True, logits_bytes=2**30)
