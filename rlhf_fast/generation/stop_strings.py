"""Where a stop string ends a text that arrives token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # what a decoder gives for bytes that are no character yet


class StopStrings:
    """Watches one row. A stop string may begin in one token and end in another, or lie inside one.

    A token can hold part of a character (byte-level tokenizers), so only whole characters are added to the text: the
    last tokens are decoded together with a few before them, and the difference is the news.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], min_tokens: int):
        self.tokenizer, self.stop, self.min_tokens = tokenizer, list(stop), min_tokens
        self.longest = max(map(len, self.stop))
        self.ids: list[int] = []
        self.text = ""
        self.end: int | None = None  # where the stop string begins in `text`
        self._context = 0  # tokens from here on are decoded together
        self._read = 0  # tokens before this one are in the text
        self._search_from = 0

    def add(self, token: int) -> bool:
        """Takes the row's next token; True when a stop string has appeared. None is looked for before min_tokens."""
        self.ids.append(token)
        old = self._decode(self.ids[self._context : self._read])
        new = self._decode(self.ids[self._context :])
        if len(new) > len(old) and not new.endswith(INCOMPLETE):
            self.text += new[len(old) :]
            self._context, self._read = self._read, len(self.ids)
        if len(self.ids) < self.min_tokens:
            self._search_from = len(self.text)
            return False
        found = [self.text.find(stop, self._search_from) for stop in self.stop]
        self.end = min((place for place in found if place >= 0), default=None)
        self._search_from = max(self._search_from, len(self.text) - self.longest + 1)
        return self.end is not None

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
