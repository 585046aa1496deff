"""A completion's text, piece by piece while it is made."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

from .stop_strings import StopStrings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pieces = Generator[str, None, None]  # of a text; closing it ends the decoding


class StreamedText(StopStrings):
    """Watches one row as StopStrings does, and hands its text to another thread.

    A piece ends before what may yet become something else: part of a character, the beginning of a stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], min_tokens: int):
        super().__init__(tokenizer, stop, min_tokens)
        self._pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self._sent = 0
        self._unread = False  # nobody reads on: the row may end

    def add(self, token: int) -> bool:
        ended = super().add(token)
        self._send(len(self.text) - self._begun() if self.end is None else self.end)
        return ended or self._unread

    def pieces(self, decode: Callable[[], object]) -> Pieces:
        """Calls `decode`, which feeds this row, in a thread; raises what it raises."""

        def run() -> None:
            try:
                decode()
                self._send(len(self.text) if self.end is None else self.end)
                self._pieces.put(None)
            except BaseException as error:
                self._pieces.put(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            while (piece := self._pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self._unread = True
            thread.join()

    def _send(self, end: int) -> None:
        if end > self._sent:
            self._pieces.put(self.text[self._sent : end])
            self._sent = end

    def _begun(self) -> int:
        """How many characters at the end of the text a stop string begins with."""
        lengths = (n for stop in self.stop for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        return max(lengths, default=0)
