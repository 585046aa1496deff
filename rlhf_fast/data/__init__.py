"""Data: files -> checked rows -> token ids -> batches. Formats: docs/data.md.

load_rows reads and checks; ChatFormat tokenises; sft_dataset, preference_dataset and prompt_dataset make examples;
EpochOrder, pack, token_budget_batches, first_fit_decreasing and pad_right make batches of them.
"""

from rlhf_fast.data.batching import pad_right, token_budget_batches
from rlhf_fast.data.chat import ChatFormat
from rlhf_fast.data.examples import (
    Examples,
    PreferenceExample,
    PromptExample,
    SFTExample,
    preference_dataset,
    prompt_dataset,
    sft_dataset,
)
from rlhf_fast.data.order import EpochOrder
from rlhf_fast.data.packing import Pack, first_fit_decreasing, pack
from rlhf_fast.data.rows import BadRow, Rows, load_rows
from rlhf_fast.data.schema import RowError

__all__ = [
    "BadRow",
    "ChatFormat",
    "EpochOrder",
    "Examples",
    "Pack",
    "PreferenceExample",
    "PromptExample",
    "RowError",
    "Rows",
    "SFTExample",
    "first_fit_decreasing",
    "load_rows",
    "pack",
    "pad_right",
    "preference_dataset",
    "prompt_dataset",
    "sft_dataset",
    "token_budget_batches",
]
