"""A reward model's folder as a reward: any AutoModelForSequenceClassification with one label, and its own tokenizer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.distributed import World
from rlhf_fast.errors import ModelError, RewardError, RLHFFastError

from .base import Prompt, Reward, RewardScores, checked_scores, describe_row


class ModelReward(Reward):
    """Reads prompt + completion + EOS as RewardTrainer does, in float32, and takes the score at the last token.

    The text goes through the reward model's own tokenizer and chat template, so it may be another family than the
    policy. A model whose tokenizer has a [CLS] token (BERT, DeBERTa) gets the pair (prompt, completion) as that
    tokenizer joins it, and pools as it was trained to. token_budget: rows x longest row of one forward.
    offload: its weights are on the device only while it scores. split: each rank of that world holds a part of them,
    and gathered() is entered around score().
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str | None = None,
        device: str = "cpu",
        offload: bool = False,
        split: World | None = None,
        token_budget: int = 16384,
    ) -> None:
        from rlhf_fast.data import ChatFormat
        from rlhf_fast.models import SplitWeights, load_scalar_model, load_tokenizer, place_frozen

        folder = Path(folder)
        self.name, self.label = name or folder.name, f"reward model {folder}"
        self.device, self.token_budget = torch.device(device), token_budget
        try:
            _check_scores_sequences(folder)
            self.pairs = _has_cls_token(folder)
            self.tokenizer = _encoder_tokenizer(folder) if self.pairs else load_tokenizer(folder)
            self.model = load_scalar_model(folder, dtype="float32").eval()
        except ModelError as error:
            raise RewardError(f"{self.label}: {error}") from error
        self.split = SplitWeights(self.model, split) if split and split.world_size > 1 else None
        self.loaded = contextlib.nullcontext if self.split else place_frozen(self.model, self.device, offload=offload)
        self.chat = ChatFormat(self.tokenizer, system_prompt=getattr(self.model.config, "system_prompt", None))
        config: Any = self.model.config.get_text_config()
        self.max_tokens = getattr(config, "max_position_embeddings", None)
        self.vocab_size = config.vocab_size

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        return self.split.gathered() if self.split else contextlib.nullcontext()

    def _score(self, prompts: list[Prompt], completions: list[str], columns: dict[str, list[Any]]) -> RewardScores:
        from rlhf_fast.data import token_budget_batches

        rows = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                row = self._encode(prompt, completion)
            except RLHFFastError as error:  # no chat template for messages, or one that refuses them
                where = describe_row(i, prompts, completions)
                raise RewardError(f"{self.label} cannot read {where}: {error}") from error
            rows.append(row)
            if self.max_tokens is not None and len(row) > self.max_tokens:
                raise RewardError(
                    f"{self.label} takes at most {self.max_tokens} tokens; there are {len(row)} at "
                    f"{describe_row(i, prompts, completions)}."
                )
        scores = torch.zeros(len(rows))
        with self.loaded():
            for batch in token_budget_batches([len(row) for row in rows], self.token_budget):
                scores[batch] = self._forward([rows[i] for i in batch])
        checked = checked_scores(self.label, scores, prompts, completions)
        return RewardScores(checked, {self.name: checked})

    def _encode(self, prompt: Prompt, completion: str) -> list[int]:
        if self.pairs:
            return list(self.tokenizer(self.chat.prompt_text(prompt), completion)["input_ids"])
        prompt_ids, completion_ids = self.chat.encode_completion(prompt, completion)
        return prompt_ids + completion_ids

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """[len(rows)] scores, on the CPU.

        transformers finds a row's last token by looking for pad_token_id from the right. That goes wrong when a row
        ends in that id, as it does when padding is EOS, so the rows are padded with an id that none of them has.
        """
        from rlhf_fast.data import pad_right

        used = {token for row in rows for token in row}
        pad_id = next((token for token in range(self.vocab_size) if token not in used), None)
        if pad_id is None and len(rows) > 1:  # a tiny vocabulary; fewer rows use less of it, one needs no padding
            half = len(rows) // 2
            return torch.cat([self._forward(rows[:half]), self._forward(rows[half:])])
        self.model.config.get_text_config().pad_token_id = pad_id
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        input_ids = pad_right(rows, pad_id or 0, self.device)
        attention_mask = torch.arange(input_ids.shape[1], device=self.device) < lengths[:, None]
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask.long())
        return outputs.logits[:, 0].float().cpu()


def _check_scores_sequences(folder: Path) -> None:
    """The folder is a reward model's, not a language model's, which could be loaded with a fresh head. ModelError."""
    from rlhf_fast.models import scores_sequences

    architectures = _read(folder / "config.json").get("architectures") or []
    if (architectures or (folder / "adapter_config.json").exists()) and not scores_sequences(folder):
        raise ModelError(
            f"{folder} holds a {', '.join(architectures) or 'policy'}, which gives no scores. Train a reward model "
            "from it with `rlhf-fast reward` and name that run's final/ folder."
        )


def _has_cls_token(folder: Path) -> bool:
    names = ("tokenizer_config.json", "special_tokens_map.json")
    return any(_read(folder / name).get("cls_token") is not None for name in names)


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # load_scalar_model and load_tokenizer say what is wrong with it
    return value if isinstance(value, dict) else {}


def _encoder_tokenizer(folder: Path) -> Any:
    """load_tokenizer asks for an EOS token, which encoders do not have."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # a broken file can raise anything
        raise ModelError(f"{folder}: the tokenizer cannot be loaded: {type(error).__name__}: {error}") from error
