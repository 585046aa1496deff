"""Models: folders in, folders out, and the modules that the trainers train.

folder.py    looks a model folder over before transformers reads it, so that every problem has a plain message
loading.py   load_tokenizer, load_causal_lm, load_scalar_model, save_model
head.py      how a model turns hidden states into logits, and that product in fp32 on the wanted tokens only
modules.py   PolicyModel, ScalarModel, SharedModel
offload.py   weights of a frozen model in the host's memory except while it is asked
split.py     weights of a frozen model of which each rank holds a part except while it is asked
padding_free.py  an attention that lets them read sequences end to end, without padding
adapters.py  LoRA: adapters added, switched off, saved, merged
"""

from .adapters import adapters_off, add_adapters
from .folder import scores_sequences
from .loading import (
    check_positions,
    check_vocabulary,
    context_length,
    export_merged,
    load_causal_lm,
    load_model_config,
    load_scalar_model,
    load_tokenizer,
    save_model,
    unwrap,
)
from .modules import (
    PolicyModel,
    ScalarModel,
    SharedModel,
    is_padding_free,
    set_gradient_checkpointing,
    set_padding_free,
)
from .offload import Loaded, OffloadedWeights, place_frozen
from .split import SplitWeights

__all__ = [
    "Loaded",
    "OffloadedWeights",
    "PolicyModel",
    "ScalarModel",
    "SharedModel",
    "SplitWeights",
    "adapters_off",
    "add_adapters",
    "check_positions",
    "check_vocabulary",
    "context_length",
    "export_merged",
    "is_padding_free",
    "load_causal_lm",
    "load_model_config",
    "load_scalar_model",
    "load_tokenizer",
    "place_frozen",
    "save_model",
    "scores_sequences",
    "set_gradient_checkpointing",
    "set_padding_free",
    "unwrap",
]
