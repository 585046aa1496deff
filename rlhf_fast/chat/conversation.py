"""What was said so far, and the model's next reply."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from rlhf_fast.data import ChatFormat
from rlhf_fast.errors import ConfigError, ModelError
from rlhf_fast.generation import Generator, SamplingParams
from rlhf_fast.generation.streaming import Pieces


class Conversation:
    """A model's side of a conversation.

    `generator` needs a tokenizer. Without a chat template there are no turns: the model continues each text by itself.
    When the messages and a whole reply no longer fit into the model's context, the oldest are forgotten, never the
    system prompt.

    Raises ConfigError: a system prompt without a chat template.
    """

    def __init__(self, generator: Generator, params: SamplingParams, system_prompt: str | None = None):
        assert generator.tokenizer is not None
        self.generator, self.format = generator, ChatFormat(generator.tokenizer)
        self.params = replace(params, stop_token_ids=[*self.format.stop_token_ids, *(params.stop_token_ids or ())])
        self.start_over(system_prompt)

    def start_over(self, system_prompt: str | None) -> None:
        """Forgets what was said."""
        if system_prompt and not self.format.has_template:
            raise ConfigError("a system prompt needs a chat template, and the model's tokenizer has none")
        self.system_prompt = system_prompt
        self.messages: list[dict[str, str]] = []
        self.forgotten = 0  # messages that no longer fit

    def reply(self, text: str) -> Pieces:
        """The reply to a message in pieces. Closed early, what was read of it is remembered as said.

        Raises DataError: the template refuses the conversation. ModelError: the message alone does not fit. Then the
        message is not remembered.
        """
        asked = {"role": "user", "content": text}
        prompt = self._prompt(asked)
        said = ""
        try:
            with contextlib.closing(self.generator.stream(prompt, self.params)) as pieces:
                for piece in pieces:
                    said += piece
                    yield piece
        except ValueError as error:
            raise ModelError(str(error)) from error
        finally:
            if self.format.has_template and said:
                self.messages += [asked, {"role": "assistant", "content": said}]

    def _prompt(self, asked: dict[str, str]) -> list[int]:
        """Ids of the conversation up to the reply to `asked`; forgets the oldest exchanges where it is too long."""
        if not self.format.has_template:
            return self.format.encode_prompt(asked["content"])
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        context = getattr(self.generator.model.config.get_text_config(), "max_position_embeddings", None)
        while True:
            prompt = self.format.encode_prompt([*system, *self.messages, asked])
            if context is None or not self.messages or len(prompt) + self.params.max_tokens <= context:
                return prompt
            del self.messages[:2]
            self.forgotten += 2
