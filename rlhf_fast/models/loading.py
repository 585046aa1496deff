"""Model folders in and out: safetensors only, nothing from the network, nothing initialised in silence."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlhf_fast.checkpoint import atomic_dir
from rlhf_fast.errors import ConfigError, ModelError

from .adapters import has_adapters, merge_adapters, save_adapters
from .folder import (
    check_adapter_weights,
    check_tokenizer_files,
    check_weights,
    existing_folder,
    has_tokenizer_files,
    read_config,
    scores_sequences,
    some,
    with_bases,
)
from .head import name_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# float64 is for tests that compare gradients.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
VALUE_HEAD = "value_head.safetensors"


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a pad token: EOS where it has none, so that the vocabulary stays.

    Raises ModelError: no such folder, no tokenizer in it, unreadable, no EOS token.
    """
    from transformers import AutoTokenizer

    folder = existing_folder(path)
    if not has_tokenizer_files(folder):
        folder = with_bases(folder)[0]  # adapters that PEFT saved may come without one
    check_tokenizer_files(folder)
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # a broken file can raise anything
        raise ModelError(f"{folder}: the tokenizer cannot be loaded: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{folder}: the tokenizer has no eos_token, so completions could never end. "
            "Set eos_token in tokenizer_config.json to one of its tokens."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(path: str | Path, *, dtype: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model in a folder, on the CPU, in eval mode, all dropout 0. Adapters are merged.

    Dropout is off for good, in the modules and in the config: PPO's ratio compares log-probs of two forwards, which
    must be the same function. The model's generation_config keeps its token ids alone, so that no temperature or
    penalty of the folder reaches sampling or is saved.

    Raises ModelError for everything that is wrong with the folder.
    """
    from transformers import AutoModelForCausalLM

    folder, adapters, config = _load_config(path, trust_remote_code)
    model, info = _from_pretrained(AutoModelForCausalLM, folder, config, dtype, trust_remote_code)
    _check_keys(folder, model, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    _keep_token_ids_only(model)
    return _merged(model, adapters)


def load_scalar_model(path: str | Path, *, dtype: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model with one number a token (value or reward), on the CPU, in eval mode, all dropout 0.

    From a reward model's folder (AutoModelForSequenceClassification with one label, or adapters that hold such a
    head), or from a causal language model's: then the head is new, with weights from N(0, 1/(H+1)^2) by torch's
    generator, so that values start near 0.

    Raises ModelError for everything that is wrong with the folder.
    """
    from transformers import AutoModelForSequenceClassification

    folder, adapters, config = _load_config(path, trust_remote_code)
    is_reward_model = scores_sequences(folder)
    if is_reward_model and config.num_labels != 1:
        raise ModelError(
            f"{folder}: a classifier with {config.num_labels} labels (id2label in config.json); a reward or value "
            "model gives one number."
        )
    config.num_labels = 1
    model, info = _from_pretrained(AutoModelForSequenceClassification, folder, config, dtype, trust_remote_code)
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    if not is_reward_model:
        fresh = {name for name in missing if name.startswith("score.")}
        missing -= fresh
        unexpected = {name for name in unexpected if not name.startswith(("lm_head.", "embed_out."))}
    _check_keys(folder, model, missing, unexpected, info["mismatched_keys"])
    if not is_reward_model:
        for name in fresh:
            parameter = model.get_parameter(name)
            nn.init.normal_(parameter, std=1 / (parameter.shape[-1] + 1)) if parameter.dim() > 1 else nn.init.zeros_(
                parameter
            )
    return _merged(model, adapters)


def check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every id of the tokenizer has an embedding. Raises ModelError."""
    inner: Any = unwrap(model)
    rows = inner.get_input_embeddings().num_embeddings
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise ModelError(
            f"{inner.config.name_or_path}: the tokenizer ({tokenizer.name_or_path}) has token ids up to {highest}, the "
            f"model's embedding {rows} rows (ids 0 to {rows - 1}). Use the model's own tokenizer, or "
            "resize_token_embeddings and save the model again."
        )


def context_length(path: str | Path, *, trust_remote_code: bool = False) -> int | None:
    """The tokens that a model folder's config gives as its longest sequence; None where it names none.

    Raises ModelError for a config that cannot be read.
    """
    config = load_model_config(path, trust_remote_code=trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_positions(model: nn.Module, longest: int, advice: str) -> None:
    """A model that has learned an embedding for each position (GPT-2, OPT) has enough of them. Raises ConfigError.

    longest: tokens of the longest sequence it will see; advice: what the user may do. Positions that are computed, as
    rotary ones are, have no end.
    """
    inner: Any = unwrap(model)
    learned = any(
        isinstance(module, nn.Embedding) and ("pos" in name or "wpe" in name) for name, module in inner.named_modules()
    )
    limit = inner.config.get_text_config().max_position_embeddings if learned else longest
    if longest > limit:
        raise ConfigError(
            f"{name_of(inner)}: {type(inner).__name__} has learned {limit} positions, the longest sequence has "
            f"{longest} tokens: {advice}"
        )


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path) -> None:
    """Writes weights (safetensors, in their dtype), config and tokenizer with its chat template.

    AutoModelForCausalLM or AutoModelForSequenceClassification and AutoTokenizer load it again. Of a model with adapters
    these alone are written, in PEFT's format. A SharedModel's value head goes into value_head.safetensors beside them.
    Under ZeRO-3 call it with the weights gathered.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    inner: Any = unwrap(model)
    scores = "ForSequenceClassification" in type(inner).__name__
    text_config = inner.config.get_text_config()
    if scores and tokenizer is not None and getattr(text_config, "pad_token_id", None) is None:
        text_config.pad_token_id = tokenizer.pad_token_id  # transformers scores no batch without it
    with _quiet():
        save_adapters(inner, folder) if has_adapters(inner) else inner.save_pretrained(folder)
    value_head = getattr(model, "value_head", None)
    if value_head is not None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in value_head.state_dict().items()}
        save_file(tensors, folder / VALUE_HEAD)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def export_merged(path: str | Path, folder: Path) -> None:
    """Write the model of a folder, adapters merged, with its tokenizer and value head into a new folder, in its dtype.

    Raises ModelError: `path` cannot be loaded. ConfigError: `folder` is there already.
    """
    if folder.exists():
        raise ConfigError(f"{folder}: is there already; name a new folder")
    dtype = load_model_config(path).dtype or torch.float32
    load = load_scalar_model if scores_sequences(Path(path)) else load_causal_lm
    model, tokenizer = load(path, dtype=str(dtype).removeprefix("torch.")), load_tokenizer(path)
    with atomic_dir(folder) as aside:
        save_model(model, tokenizer, aside)
        if (Path(path) / VALUE_HEAD).exists():
            shutil.copy(Path(path) / VALUE_HEAD, aside)


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside PolicyModel, ScalarModel or SharedModel; any other module as it is."""
    from transformers import PreTrainedModel

    inner = getattr(model, "model", None)
    return inner if isinstance(inner, PreTrainedModel) and not isinstance(model, PreTrainedModel) else model


def _load_config(path: str | Path, trust_remote_code: bool) -> tuple[Path, list[Path], PreTrainedConfig]:
    """The whole model's folder, those of adapters to it, in order, and the config, once the weights' files are known to
    be there and whole."""
    folder, *adapters = with_bases(existing_folder(path))
    config = load_model_config(path, trust_remote_code=trust_remote_code)
    check_weights(folder)
    for adapter in adapters:
        check_adapter_weights(adapter)
    return folder, adapters, config


def _merged(model: PreTrainedModel, adapters: list[Path]) -> PreTrainedModel:
    """The model with adapters of these folders in its weights, which are looked at once more."""
    for folder in adapters:
        model = merge_adapters(model, folder)
        model.config.name_or_path = str(folder)
    _check_finite(Path(model.config.name_or_path), model)
    return model


def load_model_config(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The transformers config of a model folder, all dropout 0; its weights are not looked at. Raises ModelError.

    A folder of adapters has none: it is that of the model they belong to.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    folder = with_bases(existing_folder(path))[0]
    raw = read_config(folder)
    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING and not (trust_remote_code and raw.get("auto_map")):
        if raw.get("auto_map"):
            raise ModelError(
                f"{folder}: needs Python code of its own (auto_map in config.json). Read that code, then set "
                "trust_remote_code=true to run it."
            )
        import transformers

        raise ModelError(
            f"{folder / 'config.json'}: model_type is {model_type!r}, which transformers {transformers.__version__} "
            "does not know. A newer transformers may."
        )
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # a wrong value can raise anything
        raise ModelError(f"{folder / 'config.json'}: cannot be used: {_first_line(error)}") from error
    _switch_off_noise(config)
    return config


def _from_pretrained(
    auto_class: Any, folder: Path, config: PreTrainedConfig, dtype: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r}: one of {', '.join(DTYPES)} was expected.")
    try:
        with _quiet():
            model, info = auto_class.from_pretrained(
                str(folder),
                config=config,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                # transformers before 5.21 chooses SDPA for Gemma 2 too, which leaves out the cap of the scores.
                attn_implementation="eager" if getattr(config, "attn_logit_softcapping", None) else None,
                ignore_mismatched_sizes=True,  # reported by _check_keys, with all the others
                output_loading_info=True,
            )
    except Exception as error:  # unknown architectures, wrong sizes, missing packages
        what = auto_class.__name__.removeprefix("AutoModelFor")
        if "Unrecognized configuration class" in str(error):
            raise ModelError(
                f"{folder}: model_type {config.model_type!r} has no {what} form in transformers, "
                f"so it cannot be used here (architectures: {config.architectures})."
            ) from error
        raise ModelError(f"{folder}: cannot be loaded as {what}: {_first_line(error)}") from error
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model.eval(), info


def _switch_off_noise(config: PreTrainedConfig) -> None:
    """Sets every dropout, layer drop and router jitter in the config, and the configs inside it, to 0."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            _switch_off_noise(value)
        elif ("drop" in name or "jitter" in name) and isinstance(value, float):
            setattr(config, name, 0.0)


def _check_keys(folder: Path, model: nn.Module, missing: Any, unexpected: Any, mismatched: Any) -> None:
    """transformers leaves tied weights and each model's known exceptions out of these lists already."""
    problems = []
    if missing:
        problems.append(f"weights missing from the files: {some(sorted(missing))}")
    if unexpected:
        problems.append(f"weights that the model has no place for: {some(sorted(unexpected))}")
    if mismatched:
        shapes = [
            f"{name} is {list(saved)}, the config says {list(wanted)}" for name, saved, wanted in sorted(mismatched)
        ]
        problems.append(f"wrong shapes: {some(shapes)}")
    if problems:
        raise ModelError(
            f"{folder}: config.json describes a {type(model).__name__} that these weights do not fit. "
            + "; ".join(problems)
            + ". Do config.json and the weights come from the same model?"
        )


def _check_finite(folder: Path, model: nn.Module) -> None:
    """Damaged weights would make every loss NaN, and every step a dropped one."""
    bad = [
        name
        for name, parameter in model.named_parameters()
        if parameter.numel() and not torch.stack(parameter.detach().aminmax()).isfinite().all()  # NaN is both
    ]
    if bad:
        raise ModelError(f"{folder}: NaN or infinity among the weights: {some(bad)}. Copy or download it again.")


def _keep_token_ids_only(model: Any) -> None:
    from transformers import GenerationConfig

    old = model.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{name: getattr(old, name, None) for name in names})


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and warnings of transformers: what they would say is said in our own errors."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
