"""LoRA adapters (Hu et al. 2021): y = W x + scaling * B A x beside linear layers, with W as it is.

The layers are PEFT's, put into a transformers model in place, so that the model stays of its class; the folders are
PEFT's too. A folder of adapters names the folder of the model that they belong to (folder.py: with_bases).
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_fast.checkpoint import atomic_dir
from rlhf_fast.config import TrainerConfig
from rlhf_fast.errors import ConfigError, ModelError

from .folder import ADAPTER_BASE, ADAPTER_WEIGHTS, is_adapter, some

SYSTEM_PROMPT = "system_prompt.txt"
NAME = "default"  # of the adapter, as PEFT calls the only one


def add_adapters(model: Any, config: TrainerConfig) -> None:
    """Put an adapter beside each layer that lora_target_modules names; these alone are trained from now on, and the
    score layer of a scalar model. B starts at 0: the model computes what it did.

    Raises ConfigError: a name that no layer has, the head, no default for this architecture.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    scores = getattr(model, "score", None) is not None
    lora = LoraConfig(
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        target_modules=_checked_targets(model, config.lora_target_modules),
        modules_to_save=["score"] if scores else None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    inject_adapter_in_model(lora, model, NAME)


def has_adapters(model: nn.Module) -> bool:
    """Whether add_adapters was here."""
    return hasattr(model, "peft_config")


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what it would without its adapters. For forwards without a gradient."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_adapters(model: Any, folder: Path) -> None:
    """Write the adapters into a folder that is there, as PEFT does.

    The model that they belong to is named by its absolute path. If it was itself read from a folder of adapters, it is
    written into base/ beside `folder`, so that whoever reads PEFT's format finds one model and one adapter. There is
    no config.json: beside one transformers would look for whole weights. A reward model's system prompt, which it keeps
    there, has a file of its own.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    base = Path(model.config.name_or_path)
    if is_adapter(base):
        base = folder.parent / ADAPTER_BASE
        with atomic_dir(base) as aside:
            model.save_pretrained(aside, state_dict=_state_without_adapters(model))
    lora = model.peft_config[NAME]
    if isinstance(lora.target_modules, set):  # all-linear has become one
        lora.target_modules = sorted(lora.target_modules)
    lora.base_model_name_or_path, lora.inference_mode = str(base.resolve()), True
    lora.save_pretrained(folder)
    lora.inference_mode = False
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    if getattr(model.config, "system_prompt", None) is not None:
        (folder / SYSTEM_PROMPT).write_text(model.config.system_prompt, encoding="utf-8")


@torch.no_grad()
def merge_adapters(model: Any, folder: Path) -> Any:
    """Load a folder of adapters, of any kind that can be merged, and add them to the weights; returns the model.

    Raises ModelError: unreadable, of another model, of a kind that has no merged form.
    """
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file

    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapper = PeftModel(model, config, NAME)
            found = set_peft_model_state_dict(wrapper, load_file(folder / ADAPTER_WEIGHTS), NAME)
        wrong = [name for name in found.missing_keys if f".{NAME}" in name] + list(found.unexpected_keys)
        if not wrong:
            if (folder / SYSTEM_PROMPT).exists():
                model.config.system_prompt = (folder / SYSTEM_PROMPT).read_text(encoding="utf-8")
            return wrapper.merge_and_unload()
    except Exception as error:  # a wrong config can raise anything, and so can kinds that cannot be merged
        raise ModelError(
            f"{folder}: adapters that cannot be merged into a {type(model).__name__}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:400]}"
        ) from error
    raise ModelError(
        f"{folder}: these adapters do not fit a {type(model).__name__}; missing or without a place: "
        f"{some(sorted(wrong))}. Does adapter_config.json name the model that they were trained on?"
    )


def _checked_targets(model: Any, targets: str | list[str] | None) -> str | list[str]:
    """What lora_target_modules means for this model, once every name is known to match. ConfigError."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as defaults
    from transformers.pytorch_utils import Conv1D

    head = getattr(model, "score", None)
    head = model.get_output_embeddings() if head is None else head
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding) and module is not head
    }
    there = f"{type(model).__name__} has " + ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
    if targets is None:
        if model.config.model_type not in defaults:
            raise ConfigError(
                f"lora_target_modules: there is no usual choice for {model.config.model_type}; name some, or "
                f"all-linear. {there}."
            )
        targets = list(defaults[model.config.model_type])
    if targets == "all-linear":
        return targets

    def matches(target: str, name: str) -> bool:
        if isinstance(targets, str):
            return re.fullmatch(target, name) is not None
        return name == target or name.endswith(f".{target}")

    for target in [targets] if isinstance(targets, str) else targets:
        if any(module is head and matches(target, name) for name, module in model.named_modules()):
            raise ConfigError(
                f"lora_target_modules: {target!r} is the head, whose product is a part of the losses; leave it out. "
                f"{there}."
            )
        if not any(matches(target, name) for name in layers):
            raise ConfigError(f"lora_target_modules: {target!r} matches nothing. {there}.")
    return targets


def _state_without_adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of the model as it was before add_adapters, under its own names."""
    state = {}
    for name, tensor in model.state_dict().items():
        if "lora_" not in name and ".modules_to_save." not in name:
            state[name.replace(".base_layer", "").replace(".original_module", "")] = tensor
    return state
