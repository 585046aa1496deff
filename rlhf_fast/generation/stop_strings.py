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
        self.ids: list[int] = []
        self.text = ""
        self.end: int | None = None  # where the stop string begins in `text`
        self._context = 0  # tokens from here on are decoded together
        self._read = 0  # tokens before this one are in the text

    def add(self, token: int) -> bool:
        """Takes the row's next token; True when it completes a stop string. None counts before min_tokens tokens."""
        self.ids.append(token)
        old = self._decode(self.ids[self._context : self._read])
        new = self._decode(self.ids[self._context :])
        if len(new) <= len(old) or new.endswith(INCOMPLETE):
            return False
        known = len(self.text)
        self.text += new[len(old) :]
        self._context, self._read = self._read, len(self.ids)
        if len(self.ids) < self.min_tokens:
            return False
        found = [self.text.find(stop, max(0, known - len(stop) + 1)) for stop in self.stop]  # it ends in the new part
        self.end = min((place for place in found if place >= 0), default=None)
        return self.end is not None

    @property
    def completed(self) -> str | None:
        """The text before the stop string that ended it; None while there is none."""
        return None if self.end is None else self.text[: self.end]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
