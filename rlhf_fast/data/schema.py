"""What a row must look like, for each kind of data. The fields are TRL's; docs/data.md shows them.

A null field counts as absent: Parquet and `datasets` write nulls where JSON leaves a field out.
"""

from __future__ import annotations

import difflib
import math
from typing import Any, Literal

from rlhf_fast.errors import DataError

Kind = Literal["sft", "preference", "prompt", "unsup"]
Messages = list[dict[str, Any]]
Text = str | Messages  # plain text, or a conversation

ROLES = ("system", "user", "assistant", "tool")

# Names that other data sets use for our fields, for the hint in an error message.
_OTHER_NAMES = {
    "prompt": ("instruction", "question", "query", "input", "context", "messages"),
    "completion": ("response", "output", "answer", "reply", "target"),
    "text": ("content", "document", "body", "passage"),
    "messages": ("conversations", "conversation", "dialogue", "dialog", "chat", "turns"),
    "chosen": ("preferred", "accepted", "better", "winner", "positive"),
    "rejected": ("dispreferred", "worse", "loser", "negative"),
}
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}
_TAKEN = ("prompts", "completions")  # arguments of every reward function


class RowError(DataError):
    """What is wrong with one row; `field` is None where it is the row as a whole."""

    def __init__(self, field: str | None, reason: str) -> None:
        super().__init__(f"field '{field}': {reason}" if field else reason)
        self.field = field
        self.reason = " ".join(reason.split())


def check_row(record: Any, kind: Kind) -> dict[str, Any]:
    """The fields of `kind` in one record, in the form that encoding takes; raises RowError.

    sft: {"messages"} or {"prompt", "completion"}. preference: {"prompt", "chosen", "rejected", "margin"}.
    prompt: {"prompt"} and every other column. unsup: {"text"}, or as sft. prompt and completions are both strings or
    both lists of messages.
    """
    if not isinstance(record, dict):
        raise RowError(None, f"a row must be an object with named fields, this is {_type_name(record)}")
    row = {"sft": _sft, "preference": _preference, "prompt": _prompt_only, "unsup": _unsup}[kind](record)
    try:
        _refuse_surrogates(row, "")
    except RecursionError:
        raise RowError(None, "nested too deeply") from None
    return row


def _sft(record: dict[str, Any]) -> dict[str, Any]:
    if record.get("messages") is None:
        if record.get("prompt") is None and record.get("completion") is None:
            raise _missing(record, "messages", "a row has 'prompt' and 'completion', or 'messages'", "completion")
        return _pair(_prompt(record), {"completion": _completion(record, "completion")})
    if record.get("completion") is not None:
        raise RowError("messages", "stands beside 'completion'; keep one of them")
    messages = _messages(record["messages"], "messages")
    if not any(m["role"] == "assistant" for m in messages):
        raise RowError("messages", "no assistant turn, so there is nothing to learn")
    return {"messages": messages}


def _unsup(record: dict[str, Any]) -> dict[str, Any]:
    if record.get("text") is None:
        if all(record.get(name) is None for name in ("messages", "prompt", "completion")):
            why = "a row has 'text', 'prompt' and 'completion', or 'messages'"
            raise _missing(record, "text", why, "messages", "completion")
        return _sft(record)
    for name in ("messages", "completion"):
        if record.get(name) is not None:
            raise RowError("text", f"stands beside '{name}'; keep one of them")
    text = record["text"]
    if not isinstance(text, str):
        raise RowError("text", f"must be a string, this is {_type_name(text)}")
    if not text.strip():
        raise RowError("text", "empty" if not text else "only white space")
    return {"text": text}


def _preference(record: dict[str, Any]) -> dict[str, Any]:
    chosen, rejected = _reply(record, "chosen"), _reply(record, "rejected")
    if chosen == rejected:
        raise RowError("rejected", "the same as 'chosen', so there is no preference")
    if isinstance(chosen, list) and isinstance(rejected, list) and chosen[0]["role"] != "assistant":
        if isinstance(record.get("prompt"), list):
            raise RowError("prompt", "'chosen' and 'rejected' are whole conversations already; leave 'prompt' out")
        row = _split_conversations(chosen, rejected)
    else:
        if record.get("prompt") is None:
            raise _missing(record, "prompt", "only whole conversations, from their first turn on, can do without")
        replies = {"chosen": _must_answer(chosen, "chosen"), "rejected": _must_answer(rejected, "rejected")}
        row = _pair(_prompt(record), replies)
    row["margin"] = _margin(record.get("margin"))
    return row


def _prompt_only(record: dict[str, Any]) -> dict[str, Any]:
    for name in _TAKEN:
        if name in record:
            raise RowError(name, "a reward function gets the rollout's own under this name; rename the column")
    return {**record, "prompt": _prompt(record)}


def _prompt(record: dict[str, Any]) -> Text:
    value = record.get("prompt")
    if value is None:
        raise _missing(record, "prompt")
    if isinstance(value, str):
        return value
    messages = _messages(value, "prompt", or_string=True)
    if messages[-1]["role"] == "assistant":
        raise RowError("prompt", "ends with an assistant turn, so there is nothing to answer")
    return messages


def _reply(record: dict[str, Any], name: str) -> Text:
    """A completion: text that is not blank, or messages."""
    value = record.get(name)
    if value is None:
        raise _missing(record, name)
    if not isinstance(value, str):
        return _messages(value, name, or_string=True)
    if not value.strip():
        raise RowError(name, "empty" if not value else "only white space")
    return value


def _completion(record: dict[str, Any], name: str) -> Text:
    return _must_answer(_reply(record, name), name)


def _must_answer(reply: Text, name: str) -> Text:
    if isinstance(reply, list) and not reply[0]["role"] == reply[-1]["role"] == "assistant":
        raise RowError(name, "must begin and end with an assistant turn")
    return reply


def _pair(prompt: Text, completions: dict[str, Any]) -> dict[str, Any]:
    """One row of strings, or one of messages: beside messages, a string is one user or one assistant message."""
    if isinstance(prompt, str) and all(isinstance(c, str) for c in completions.values()):
        return {"prompt": prompt, **completions}
    row: dict[str, Any] = {"prompt": as_messages(prompt, "user")}
    row.update((name, as_messages(completion, "assistant")) for name, completion in completions.items())
    return row


def as_messages(text: Text, role: str) -> Messages:
    """A conversation as it is; plain text as one message of `role`."""
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _split_conversations(chosen: Messages, rejected: Messages) -> dict[str, Any]:
    """prompt, chosen and rejected of two conversations that begin alike: the prompt is what they share."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise RowError("rejected", "begins differently from 'chosen', so they do not answer the same prompt")
    prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    for name, reply in (("chosen", chosen), ("rejected", rejected)):
        if not reply:
            raise RowError(name, "the other conversation begins with all of it; the two must part at a reply")
        if not reply[0]["role"] == reply[-1]["role"] == "assistant":
            raise RowError(name, "must part from the other conversation at an assistant turn, and end with one")
    if prompt[-1]["role"] == "assistant":
        raise RowError("chosen", "parts from 'rejected' after an assistant turn, so there is no prompt to answer")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _messages(value: Any, field: str, or_string: bool = False) -> Messages:
    if not isinstance(value, list):
        expected = "a string or a list of messages" if or_string else "a list of messages"
        raise RowError(field, f"must be {expected}, this is {_type_name(value)}")
    if not value:
        raise RowError(field, "an empty list")
    return [_message(message, f"{field}[{i}]") for i, message in enumerate(value)]


def _message(message: Any, field: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RowError(field, f'must be an object like {{"role": ..., "content": ...}}, this is {_type_name(message)}')
    message = {key: value for key, value in message.items() if value is not None}
    if "from" in message and "role" not in message:
        raise RowError(field, "has 'from' and 'value'; name them 'role' and 'content', with roles user and assistant")
    role = message.get("role")
    if role not in ROLES:
        other = _OTHER_ROLES.get(role) if isinstance(role, str) else None
        hint = f"; write '{other}'" if other else ""
        raise RowError(f"{field}.role", f"must be one of {', '.join(ROLES)}, this is {_quote(role)}{hint}")
    content = message.get("content")
    if role == "assistant" and message.get("tool_calls"):  # a call may come without words
        content = message.setdefault("content", "")
    elif isinstance(content, str) and role == "assistant" and not content.strip():
        raise RowError(f"{field}.content", "an assistant turn that says nothing")
    if content is None:
        raise RowError(f"{field}.content", "missing or null; it must be a string")
    if not isinstance(content, str):
        raise RowError(f"{field}.content", f"must be a string, this is {_type_name(content)}")
    return message


def _margin(value: Any) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError("margin", f"must be a number, this is {_type_name(value)}")
    try:
        margin = float(value)
    except OverflowError:
        margin = math.inf
    if not math.isfinite(margin):
        raise RowError("margin", f"must be finite, this is {margin}")
    return margin


def _missing(record: dict[str, Any], field: str, why: str = "", *also: str) -> RowError:
    names = [name for name in record if isinstance(name, str) and record[name] is not None]
    for wanted in (field, *also):
        other = next((n for n in names if n.lower() in (wanted, *_OTHER_NAMES.get(wanted, ()))), None)
        close = [other] if other else difflib.get_close_matches(wanted, names, n=1, cutoff=0.75)
        if close:
            return RowError(wanted, f"missing; there is '{close[0]}': rename it to '{wanted}'")
    empty = " (it is null)" if field in record else ""
    has = f"; the row has {', '.join(map(_quote, names[:8])) or 'no field'}"
    return RowError(field, f"missing{empty}{'; ' + why if why else ''}{has}")


def _refuse_surrogates(value: Any, field: str) -> None:
    """UTF-8 has no form for half of a surrogate pair, and no tokenizer takes one: JSON's \\ud83d alone is not text."""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                code = ord(value[error.start])
                raise RowError(
                    field or None, f"a lone surrogate, \\u{code:04x}, at character {error.start}: not text; take it out"
                ) from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _refuse_surrogates(key, field)
            _refuse_surrogates(item, f"{field}.{key}" if field else str(key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _refuse_surrogates(item, f"{field}[{i}]")


def _quote(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "a number"
    return names.get(type(value), type(value).__name__)
