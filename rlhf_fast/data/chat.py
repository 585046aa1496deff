"""From rows to token ids: chat templates, system prompts, and which tokens are the assistant's.

A conversation is rendered by the template and cut where the assistant's turns begin and end; each piece is tokenised on
its own. So a reply is trained after the very ids that `encode_prompt` gives the policy at a rollout, whatever the
tokenizer would merge across the border.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from rlhf_fast.data.schema import Messages, RowError, Text, as_messages
from rlhf_fast.errors import ConfigError

if TYPE_CHECKING:  # takes seconds to import, and whoever passes a tokenizer has it
    from transformers import PreTrainedTokenizerBase

_PROBE_REPLY = "Answer"


class ChatFormat:
    """Turns prompts, completions and conversations into token ids.

    system_prompt: put before every conversation that has no system message of its own; needs a chat template.
    chat_template: a Jinja template, a file that holds one, or the name of one of the tokenizer's; default: the
        tokenizer's own. One that is given is set on the tokenizer too, so that it is saved with the model.

    Without a template only plain strings can be encoded: BOS if the tokenizer adds one, prompt, completion, EOS. With
    a template, a plain string is one user message or one assistant message.

    Raises ConfigError for a template that is missing or does not render and a system prompt that cannot be put
    anywhere; encoding a completion raises it for a tokenizer that has no token to end it with.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system_prompt: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self._template_name = "the tokenizer's own chat template"
        if chat_template is not None:
            tokenizer.chat_template = self._read_template(chat_template)
        self.has_template = bool(tokenizer.chat_template)
        if system_prompt is not None and not self.has_template:
            raise ConfigError(
                "system_prompt needs a chat template, and the tokenizer has none; give one with chat_template, or put "
                "the text into the prompts themselves"
            )
        self._begin_ids = self._added_at_begin()
        self._pads_front = self._ids("\na") != self._ids("\n") + self._ids("a")
        #: The token that ends an assistant's turn: EOS, or the template's own marker (Gemma: <end_of_turn>).
        self.end_token_id: int | None = self._find_end_token() if self.has_template else tokenizer.eos_token_id

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens at which a rollout must stop: the end of a turn, and EOS if that is another one."""
        return sorted({i for i in (self.end_token_id, self.tokenizer.eos_token_id) if i is not None})

    def encode_prompt(self, prompt: Text) -> list[int]:
        """Ids that the policy continues. A list of messages ends with the template's opening of the assistant's turn.

        Raises ConfigError for messages without a chat template, RowError (a DataError) if the template refuses them.
        """
        if self.has_template:
            return self._ids(self._render(as_messages(prompt, "user"), reply=True))
        return self._begun_ids(self._plain(prompt))

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text that is no conversation: BOS if the tokenizer adds one, text, EOS; no template."""
        return [*self._begun_ids(text), self.tokenizer.eos_token_id]

    def encode_completion(self, prompt: Text, completion: Text) -> tuple[list[int], list[int]]:
        """(prompt ids, as encode_prompt gives them; completion ids, which end with `end_token_id`).

        completion: a string, or messages from one assistant turn to another. Raises as encode_prompt does.
        """
        if self.has_template:
            before = as_messages(prompt, "user")
            ids, mask = self.encode_messages(before + as_messages(completion, "assistant"), train_from=len(before))
            start = mask.index(True)
            return ids[:start], ids[start:]
        prompt_ids, text = self.encode_prompt(prompt), self._plain(completion)
        # The beginning of a text and its continuation differ for tokenizers that put a space in front.
        ids = self._continuation_ids(text) if prompt else self._ids(text)
        return prompt_ids, self._ended(ids)

    def encode_messages(self, messages: Messages, *, train_from: int = 0) -> tuple[list[int], list[bool]]:
        """(ids, mask) of a conversation up to its last assistant turn, [L] each.

        mask is True on what the assistant's turns from message `train_from` on say, their end marker included, and
        False on everything else: other turns, role headers, white space that the template puts after the marker.
        The last turn ends with `end_token_id` even where the template does not write it.

        Raises ConfigError without a chat template; RowError (a DataError) if there is no such turn, if the template
        refuses the messages, or if it renders a turn differently once others follow, so that the policy could never
        have been asked for what would be trained.
        """
        pieces = self._pieces(messages, train_from)
        if not pieces:
            raise RowError(None, "no assistant turn, so there is nothing to learn")
        ids: list[int] = []
        mask: list[bool] = []
        for i, (before, turn) in enumerate(pieces):
            before_ids = self._continuation_ids(before) if i else self._ids(before)
            turn_ids = self._continuation_ids(turn) if ids or before_ids else self._ids(turn)
            said = self._said(turn_ids)
            if i == len(pieces) - 1:
                turn_ids = self._ended(turn_ids[:said])
                said = len(turn_ids)
            ids += before_ids + turn_ids
            mask += [False] * len(before_ids) + [True] * said + [False] * (len(turn_ids) - said)
        return ids, mask

    def prompt_text(self, prompt: Text) -> str:
        """What a reward function sees as the prompt.

        A string as it is; the content of a conversation's only turn, if that is the user's (beside a system message);
        else the whole conversation as the template renders it.
        """
        if isinstance(prompt, str):
            return prompt
        turns = [m for m in prompt if m["role"] != "system"]
        if len(turns) == 1 and turns[0]["role"] == "user":
            return str(turns[0]["content"])
        return self._render(prompt, reply=True)

    # Templates

    def _read_template(self, given: str) -> str:
        own = self.tokenizer.chat_template
        if isinstance(own, dict) and given in own:
            self._template_name = f"the tokenizer's chat template '{given}'"
            return str(own[given])
        if "{{" in given or "{%" in given:
            self._template_name = "the chat template given by chat_template"
            return given
        self._template_name = f"the chat template {given}"
        try:
            return Path(given).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"chat_template: {given!r} is no Jinja template (it has no {{{{ or {{%) and cannot be read as a file "
                f"that holds one: {error}"
            ) from error

    def _find_end_token(self) -> int | None:
        """Render one exchange, which also tells early whether the template works; look what follows the reply."""
        try:
            text = self._render([*as_messages("Question", "user"), *as_messages(_PROBE_REPLY, "assistant")])
            self._render(as_messages("Question", "user"), reply=True)
        except RowError as error:
            hint = "; leave system_prompt out if it knows no system role" if self.system_prompt is not None else ""
            raise ConfigError(f"{error.reason}{hint}") from error
        position = text.rfind(_PROBE_REPLY)
        if position < 0:
            raise ConfigError(f"{self._template_name} does not write what the assistant says")
        tail = self._ids(text[position + len(_PROBE_REPLY) :])
        special = set(self.tokenizer.all_special_ids)
        special |= {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return next((i for i in tail if i in special), self.tokenizer.eos_token_id)

    def _render(self, messages: Messages, *, reply: bool = False) -> str:
        """The conversation as text; reply: with the opening of an assistant's turn at the end."""
        if not self.has_template:
            raise ConfigError(
                "the data has conversations (lists of messages), and the tokenizer has no chat template; give one with "
                "chat_template, or write the data as plain strings"
            )
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages = [*as_messages(self.system_prompt, "system"), *messages]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply))
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            # A template's own complaint, such as "roles must alternate", and whatever it runs into.
            raise RowError(None, f"{self._template_name} fails: {error or type(error).__name__}") from error

    def _pieces(self, messages: Messages, train_from: int) -> list[tuple[str, str]]:
        """(text since the last trained turn, text of the trained turn) for each trained turn."""
        turns = [i for i in range(train_from, len(messages)) if messages[i]["role"] == "assistant"]
        if not turns:
            return []
        whole = self._render(messages[: turns[-1] + 1])
        pieces: list[tuple[str, str]] = []
        done = 0
        for i in turns:
            begin = self._render(messages[:i], reply=True) if i else whole[: self._opening_end(whole)]
            end = whole if i == turns[-1] else self._begun(self._render(messages[: i + 1]), whole)
            if not (whole.startswith(end) and end.startswith(begin) and done <= len(begin)):
                raise RowError(
                    None,
                    f"{self._template_name} writes assistant turn {i + 1} differently when it asks for it, or once "
                    "other turns follow, so it cannot be told which tokens are the assistant's; write the row as "
                    "'prompt' and 'completion' with one assistant turn at the end, or give another chat_template",
                )
            pieces.append((whole[done : len(begin)], whole[len(begin) : len(end)]))
            done = len(end)
        return pieces

    def _begun(self, part: str, whole: str) -> str:
        """A rendered part of a conversation without the EOS with which some templates (Phi) close a whole one."""
        return part if whole.startswith(part) else part.removesuffix(self.tokenizer.eos_token or "")

    def _opening_end(self, whole: str) -> int:
        """Where the header of an assistant's turn ends in a conversation that begins with one: nothing comes before
        it that could be rendered alone, so look for the header that a question gets."""
        question = as_messages("Question", "user")
        asked = self._render(question, reply=True)
        opening = asked.removeprefix(self._begun(self._render(question), asked))
        return whole.find(opening) + len(opening) if opening in whole else 0

    def _said(self, turn: list[int]) -> int:
        """How many of a turn's ids the assistant says: up to its end marker, or to the white space at the end."""
        for i in reversed(range(len(turn))):
            if turn[i] == self.end_token_id:
                return i + 1
        length = len(turn)
        while length and not self.tokenizer.decode(turn[length - 1 : length]).strip():
            length -= 1
        return length

    # Tokens

    def _ended(self, ids: list[int]) -> list[int]:
        if self.end_token_id is None:
            raise ConfigError("the tokenizer has no EOS token, so a completion could not end; set its eos_token")
        return ids if ids[-1:] == [self.end_token_id] else [*ids, self.end_token_id]

    def _plain(self, text: Text) -> str:
        return text if isinstance(text, str) else self._render(text)

    def _ids(self, text: str) -> list[int]:
        """Ids of a text at its beginning, nothing added. verbose=False: we look at lengths ourselves."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _begun_ids(self, text: str) -> list[int]:
        """Ids of a text after BOS, once: one that begins with BOS itself gets no second one."""
        ids = self._ids(text)
        return ids if ids[: len(self._begin_ids)] == self._begin_ids else self._begin_ids + ids

    def _continuation_ids(self, text: str) -> list[int]:
        """Ids of a text that follows another. Tokenizers that put a space in front of a text must not do so here."""
        if not self._pads_front or not text:
            return self._ids(text)
        before = self._ids("\n")
        ids = self._ids("\n" + text)
        return ids[len(before) :] if ids[: len(before)] == before else self._ids(text)

    def _added_at_begin(self) -> list[int]:
        """What the tokenizer puts before every text: BOS, or nothing."""
        plain, added = self._ids("a"), list(self.tokenizer("a").input_ids)
        return next((added[:i] for i in range(len(added)) if added[i : i + len(plain)] == plain), [])
