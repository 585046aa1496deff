"""The cost model behind `rlhf-fast plan`, and the recipes for sizes that no test can run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.generation.shapes import SHAPES
from rlhf_fast.cli import main
from rlhf_fast.config import PPOConfig
from rlhf_fast.config_loading import check_config, load_config
from rlhf_fast.errors import ConfigError
from rlhf_fast.plan import Plan, memory_plan, ppo_lines
from rlhf_fast.scaling import MACHINES, SIZES, memory, plan_report, step_cost
from rlhf_fast.training_memory import Shape

RECIPES = Path(__file__).parents[1] / "recipes" / "scale"


@pytest.mark.parametrize(
    ("size", "published"),
    [("135m", 0.1345), ("1b", 1.236), ("3b", 3.21), ("8b", 8.03), ("14b", 14.77), ("32b", 32.76), ("70b", 70.55)],
)
def test_sizes_are_those_of_published_models(size: str, published: float) -> None:
    assert SIZES[size].parameters / 1e9 == pytest.approx(published, rel=3e-3)


def test_parameters_are_transformers_own() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES["SmolLM2-135M"]))
    assert sum(p.numel() for p in model.parameters()) == SIZES["135m"].parameters


# What each recipe's comment promises: the model's size and the number of GPUs of 80 GB.
PROMISED = {
    "one_gpu": ("1b", 1),
    "one_gpu_lora": ("8b", 1),
    "one_node_zero2": ("3b", 8),
    "one_node_zero3_offload": ("14b", 8),
    "two_nodes": ("8b", 16),
}


def with_adapters(shape: Shape, rank: int) -> Shape:
    """A Llama of that shape, adapters on all its linear layers."""
    attention = 2 * (shape.hidden + shape.hidden) + 2 * (shape.hidden + shape.kv_width)
    adapters = shape.layers * rank * (attention + 3 * (shape.hidden + shape.intermediate))
    return replace(shape, parameters=shape.parameters + adapters, trained=adapters)


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_recipes_hold_what_they_promise(recipe: str) -> None:
    config = load_config(PPOConfig, RECIPES / f"{recipe}.yaml")
    check_config(config)
    size, gpus = PROMISED[recipe]
    shape = with_adapters(SIZES[size], config.lora_r) if config.use_peft else SIZES[size]
    assert memory(shape, config, MACHINES["h100"], gpus).total < 0.9 * MACHINES["h100"].memory
    assert (config.batch_size // config.num_generations) % gpus == 0


def test_memory_falls_from_stage_to_stage() -> None:
    def whole(stage: int, gpus: int, **fields: object) -> Plan:
        config = PPOConfig(model_name_or_path="-", train_data="-", dtype="bfloat16", zero_stage=stage, **fields)
        return memory(SIZES["8b"], config, MACHINES["h100"], gpus)

    assert whole(1, 8).total > whole(2, 8).total > whole(3, 8).total
    # Two models' master weights and moments, 12 bytes a weight, and gradients, from stage 2 on 4; a reference of 2.
    parameters = SIZES["8b"].parameters
    few: dict[str, object] = {"rollout_batch_size": 1, "micro_batch_tokens": 256}
    alone, eight = (whole(2, gpus, batch_size=gpus, **few) for gpus in (1, 8))
    assert alone.total - eight.total == pytest.approx(2 * 16 * parameters * 7 / 8, rel=0.01)
    assert whole(2, 8).total - whole(2, 8, offload_optimizer=True).total == pytest.approx(2 * 12 * parameters / 8)
    assert whole(2, 8).total - whole(2, 8, ref_zero_stage=3).total == pytest.approx(2 * parameters * 7 / 8)


def test_its_memory_is_the_dry_run_s(tmp_path: Path) -> None:
    """A folder of that shape and the shape alone give one plan, line by line."""
    from transformers import LlamaConfig

    LlamaConfig(**SHAPES["SmolLM2-135M"]).save_pretrained(tmp_path)
    config = PPOConfig(model_name_or_path=str(tmp_path), train_data="-", gradient_checkpointing=True)
    of_folder = {line.name: line for line in memory_plan(config).lines}
    of_shape = {line.name: line for line in ppo_lines(SIZES["135m"], config, 1, on_gpu=torch.cuda.is_available())}
    critic = of_folder.pop("value model"), of_shape.pop("value model")
    assert critic[0].total == pytest.approx(critic[1].total, rel=1e-3)
    of_folder.pop("program")
    assert of_folder == of_shape


def test_a_step_costs_less_on_more_gpus_and_more_over_a_network() -> None:
    config = PPOConfig(model_name_or_path="-", train_data="-", dtype="bfloat16", zero_stage=3, batch_size=512)
    few, many = (step_cost(SIZES["8b"], config, MACHINES["h100"], gpus) for gpus in (8, 16))
    for phase in ("score", "train"):
        assert many.seconds[phase] == pytest.approx(few.seconds[phase] / 2)
    assert many.seconds["traffic"] > few.seconds["traffic"]  # it leaves the node
    within = step_cost(SIZES["8b"], config, MACHINES["h100"], 16, per_node=16)
    assert within.seconds["traffic"] < many.seconds["traffic"]
    assert step_cost(SIZES["8b"], config, MACHINES["h100"], 1).seconds["traffic"] == 0


def test_a_shared_trunk_is_one_model_to_train() -> None:
    two, one = (
        PPOConfig(model_name_or_path="-", train_data="-", dtype="bfloat16", value_model=kind)
        for kind in ("separate", "shared")
    )
    separate, shared = (step_cost(SIZES["8b"], config, MACHINES["h100"], 8) for config in (two, one))
    head = SIZES["8b"].vocabulary * SIZES["8b"].hidden * two.batch_size / 8 * two.max_new_tokens
    rate = MACHINES["h100"].flops * MACHINES["h100"].efficiency
    head_trained, heads_asked = 6 * head / rate, 4 * head / rate  # the policy's; the policy's and the reference's
    assert shared.seconds["train"] - head_trained == pytest.approx((separate.seconds["train"] - head_trained) / 2)
    # Values come with the log-probs.
    assert shared.seconds["score"] - heads_asked == pytest.approx((separate.seconds["score"] - heads_asked) * 2 / 3)
    assert shared.sent == {name: pytest.approx(size / 2) for name, size in separate.sent.items()}


def test_stage_0_in_half_precision_is_stage_1() -> None:
    zero, one = (
        PPOConfig(model_name_or_path="-", train_data="-", dtype="bfloat16", zero_stage=stage) for stage in (0, 1)
    )
    assert step_cost(SIZES["1b"], zero, MACHINES["h100"], 8) == step_cost(SIZES["1b"], one, MACHINES["h100"], 8)


def test_the_command_says_what_fits_and_what_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model-size", "8b", "--gpus", "8"]) == 0
    printed = capsys.readouterr().out
    assert "the first that fits: zero_stage 3" in printed
    assert "does not fit" in printed
    assert "rollout" in printed
    # A rollout needs the policy whole on a GPU: no number of them helps.
    assert "gathers the policy whole on each GPU: 141 GB of 80" in plan_report("70b", 64)
    assert "the first that fits" in plan_report("70b", 64, "b200", overrides=["rollout_batch_size=8"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "7b", "gpus": 8}, "--model-size: '7b' is not one of 135m, 1b"),
        ({"size": "8b", "gpus": 8, "gpu": "v100"}, "--gpu: 'v100' is not one of a100-40gb"),
        ({"size": "8b", "gpus": 0}, "--gpus .* at least 1, got 0"),
        ({"size": "8b", "gpus": 1024}, "batch_size: 512 completions leave some of the 1024 GPUs"),
        ({"size": "8b", "gpus": 8, "overrides": ["zero_stage=2"]}, "zero_stage: the plan says what is needed"),
        ({"size": "8b", "gpus": 8, "overrides": ["batch_sise=2"]}, "batch_sise"),
        ({"size": "8b", "gpus": 8, "overrides": ["temperature=0"]}, "temperature: must be more than 0"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_report(**arguments)  # type: ignore[arg-type]
