"""The chat's face: lines in, text out as it is made. A terminal gets colours and editing, a pipe one answer a line."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from rlhf_fast.errors import RLHFFastError

from .conversation import Conversation

HELP = "/system TEXT sets a system prompt, /reset starts over, /exit or Ctrl-D ends; Ctrl-C stops an answer"
_BOLD, _DIM, _PLAIN = "\033[1m", "\033[2m", "\033[0m"


def chat(conversation: Conversation) -> None:
    """Answers what standard input brings until it ends. Answers go to standard output, remarks to standard error."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte is no reason to end
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        _remark(HELP)
        if not conversation.format.has_template:
            _remark("the tokenizer has no chat template: each line is continued by itself, without what came before")
    for line in _typed() if on_terminal else sys.stdin:
        text = line.strip()
        if text == "/exit":
            break
        if text.startswith("/"):
            _command(conversation, text)
        elif text:
            _answer(conversation, text)


def _typed() -> Iterator[str]:
    """Lines of a terminal, with history and editing."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() uses it once it is loaded)
    # Without the marks readline would count the colours as characters of the line.
    prompt = f"\001{_BOLD}\002> \001{_PLAIN}\002" if _coloured(sys.stdout) else "> "
    while True:
        try:
            yield input(prompt)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            _remark(HELP)


def _command(conversation: Conversation, text: str) -> None:
    name, _, rest = text.partition(" ")
    try:
        if name == "/reset":
            conversation.start_over(conversation.system_prompt)
        elif name == "/system":
            conversation.start_over(rest.strip() or None)
        else:
            _remark(f"no command {name}: {HELP}")
            return
        _remark("a new conversation")
    except RLHFFastError as error:
        _remark(str(error))


def _answer(conversation: Conversation, text: str) -> None:
    """Prints the answer to a message as it comes. Ctrl-C ends the answer alone."""
    forgotten = conversation.forgotten
    try:
        with contextlib.closing(conversation.reply(text)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    except RLHFFastError as error:
        _remark(str(error))
    print(flush=True)
    if conversation.forgotten > forgotten:
        _remark(f"the conversation outgrew the model's context: {conversation.forgotten} messages are forgotten")


def _remark(text: str) -> None:
    print(f"{_DIM}{text}{_PLAIN}" if _coloured(sys.stderr) else text, file=sys.stderr, flush=True)


def _coloured(stream: TextIO) -> bool:
    """Only on a terminal that has colours, and unless the user wants none (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
