"""Rows turned into examples: token ids with what is trained on them. One function for each kind of data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rlhf_fast.data.chat import ChatFormat
from rlhf_fast.data.rows import BadRow, Rows, report_bad_rows, settle_bad_rows
from rlhf_fast.data.schema import RowError, Text, as_messages


@dataclass(frozen=True)
class SFTExample:
    """input_ids and loss_mask, [L] each. The mask is True on tokens to learn, never the first: nothing precedes it."""

    input_ids: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True)
class PreferenceExample:
    """Ids of prompt + completion, for both completions. margin: by how much the chosen one should win, in reward."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float


@dataclass(frozen=True)
class PromptExample:
    """prompt_ids for the policy; the prompt as the row has it; the row's other columns, for the reward function.

    All examples of a data set have the same columns, None where a row has no such field.
    """

    prompt_ids: list[int]
    prompt: Text
    columns: dict[str, Any]


Example = TypeVar("Example", bound=SFTExample | PreferenceExample | PromptExample)


class Examples(list[Example], Generic[Example]):
    """Examples in the order of the rows, and all rows that were left out on the way, those of `load_rows` included."""

    def __init__(self, examples: list[Example], bad_rows: list[BadRow]) -> None:
        super().__init__(examples)
        self.bad_rows = bad_rows

    def report(self) -> str:
        """One line on the bad rows left out; "" if there are none."""
        return report_bad_rows(self.bad_rows, len(self))


def sft_dataset(
    rows: Rows, chat: ChatFormat, *, max_length: int, completion_only_loss: bool = True
) -> Examples[SFTExample]:
    """Rows of kind "sft" or "unsup" as examples of at most max_length tokens, cut at the end.

    completion_only_loss: learn the completion, or all assistant turns of messages, end markers included; else, and of
    a plain text always, every token but the first. A row whose cut leaves nothing to learn is a bad row (see
    `load_rows` for what that means).
    """

    def example(row: dict[str, Any]) -> SFTExample:
        ids, mask = _encode_sft(row, chat)
        if not completion_only_loss:
            mask = [True] * len(ids)
        mask[0] = False
        if not any(mask[:max_length]):
            before = mask.index(True) if True in mask else len(ids)
            raise RowError(
                next(name for name in ("text", "messages", "prompt") if name in row),
                f"{before} tokens come before what is to be learnt, and max_length is {max_length}; raise max_length",
            )
        return SFTExample(ids[:max_length], mask[:max_length])

    return _examples(rows, example)


def _encode_sft(row: dict[str, Any], chat: ChatFormat) -> tuple[list[int], list[bool]]:
    if "text" in row:
        ids = chat.encode_text(row["text"])
        return ids, [True] * len(ids)
    if "messages" in row:
        return chat.encode_messages(row["messages"])
    if not isinstance(row["prompt"], str) or chat.has_template:
        # As one conversation: what tools say between the completion's turns is not learnt.
        prompt = as_messages(row["prompt"], "user")
        return chat.encode_messages(prompt + as_messages(row["completion"], "assistant"), train_from=len(prompt))
    prompt_ids, ids = chat.encode_completion(row["prompt"], row["completion"])
    return prompt_ids + ids, [False] * len(prompt_ids) + [True] * len(ids)


def preference_dataset(rows: Rows, chat: ChatFormat, *, max_length: int) -> Examples[PreferenceExample]:
    """Rows of kind "preference" as pairs. A pair of which either side has more than max_length tokens is a bad row."""

    def example(row: dict[str, Any]) -> PreferenceExample:
        sides: dict[str, list[int]] = {}
        for name in ("chosen", "rejected"):
            prompt_ids, ids = chat.encode_completion(row["prompt"], row[name])
            length = len(prompt_ids) + len(ids)
            if length > max_length:
                raise RowError(name, _too_long("prompt and completion have", length, "max_length", max_length))
            sides[name] = prompt_ids + ids
        return PreferenceExample(sides["chosen"], sides["rejected"], row["margin"])

    return _examples(rows, example)


def prompt_dataset(
    rows: Rows, chat: ChatFormat, *, max_prompt_length: int, context: int | None = None
) -> Examples[PromptExample]:
    """Rows of kind "prompt" as prompts for rollouts.

    One of no token, of more than max_prompt_length, or that fills the model's `context` is a bad row.
    """
    names = sorted({name for row in rows for name in row} - {"prompt"})

    def example(row: dict[str, Any]) -> PromptExample:
        ids = chat.encode_prompt(row["prompt"])
        if not ids:
            raise RowError("prompt", "empty, and the tokenizer has no BOS token to begin from")
        if len(ids) > max_prompt_length:
            raise RowError("prompt", _too_long("it has", len(ids), "max_prompt_length", max_prompt_length))
        if context is not None and len(ids) >= context:
            raise RowError(
                "prompt",
                f"too long: it has {len(ids)} tokens, the model's context {context}, which leaves no room for a "
                "completion; shorten it",
            )
        return PromptExample(ids, row["prompt"], {name: row.get(name) for name in names})

    return _examples(rows, example)


def _too_long(what: str, length: int, name: str, limit: int) -> str:
    return f"too long: {what} {length} tokens, {name} is {limit}; shorten it or raise {name}"


def _examples(rows: Rows, make: Callable[[dict[str, Any]], Example]) -> Examples[Example]:
    examples: list[Example] = []
    bad_rows = list(rows.bad_rows)
    for row, (path, line) in zip(rows, rows.places, strict=True):
        try:
            examples.append(make(row))
        except RowError as error:
            bad_rows.append(BadRow(path, line, error.field, error.reason))
    settle_bad_rows(bad_rows, len(examples), rows.on_bad_row)
    return Examples(examples, bad_rows)
