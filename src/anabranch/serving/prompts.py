"""From messages and texts to the token ids that an engine takes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from anabranch.errors import InvalidRequest, RequestTooLong
from anabranch.models.protocol import ContrastParameters, Message
from anabranch.models.tools import Tool, render
from anabranch.serving.contrast import UncertaintyContrast, lame_prompt
from anabranch.serving.contrast.pairs import Contrast


class Prompts:
    """A model's tokenizer and chat template.

    Tokenizing is done in other threads than the event loop's. Text that cannot fit into
    ``max_context`` tokens is refused without spending seconds on it.
    """

    def __init__(self, model: str, tokenizer: Any, max_context: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._max_context = max_context
        self._longest_token = max(map(len, tokenizer.get_vocab()), default=1)

    async def of_text(self, text: str | Sequence[int], field: str) -> Sequence[int]:
        """Token ids of a text; ids are taken as they are. ``field`` is for errors."""
        if not isinstance(text, str):
            return list(text)
        self._refuse_hopeless(len(text), field)
        return await asyncio.to_thread(lambda: self._tokenizer(text)["input_ids"])

    async def of_messages(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), opening: str = ""
    ) -> Sequence[int]:
        """Token ids of the chat template's text, followed by the answer's ``opening``."""
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise InvalidRequest(
                "messages",
                f"{self._model!r} has no chat template; use /v1/completions with a plain prompt",
            )
        self._refuse_hopeless(sum(len(str(m.get("content"))) for m in messages), "messages")
        return await asyncio.to_thread(self._render, messages, tools, opening)

    async def contrast_of_text(
        self, text: str | Sequence[int], contrast: ContrastParameters
    ) -> Contrast:
        """The lame prompt beside a text that shows examples."""
        if not isinstance(text, str):
            raise InvalidRequest("contrast", "needs the prompt as text, not as token ids")
        lame = await asyncio.to_thread(lame_text, text, contrast)
        return _contrast(await self.of_text(lame, "contrast.prompt"), contrast)

    async def contrast_of_messages(
        self,
        messages: Sequence[Message],
        contrast: ContrastParameters,
        tools: Sequence[Tool] = (),
        opening: str = "",
    ) -> Contrast:
        """The lame prompt beside messages of which the last user's shows examples."""
        lame = await asyncio.to_thread(without_examples, messages, contrast)
        return _contrast(await self.of_messages(lame, tools, opening), contrast)

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Tool], opening: str
    ) -> Sequence[int]:
        try:
            rendered = render(self._tokenizer, messages, tools) + opening
        except Exception as error:  # templates raise whatever their author chose
            raise InvalidRequest("messages", f"the chat template refuses them: {error}") from error
        self._refuse_hopeless(len(rendered), "messages")
        ids: Sequence[int] = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return ids

    def _refuse_hopeless(self, characters: int, field: str) -> None:
        fewest = characters // self._longest_token
        if fewest > self._max_context:
            raise RequestTooLong(
                field,
                f"{characters} characters are at least {fewest} tokens, but at most "
                f"{self._max_context} fit in the context",
            )


def lame_text(text: str, contrast: ContrastParameters) -> str:
    """The prompt without its examples, or what the client gave for it."""
    if contrast.prompt is not None:
        return contrast.prompt
    found = lame_prompt(text)
    if found is None:
        raise InvalidRequest(
            "contrast.prompt",
            "no examples were found to leave out of the prompt; give the text without them, or "
            "leave out contrast",
        )
    return found


def without_examples(
    messages: Sequence[Message], contrast: ContrastParameters
) -> Sequence[Message]:
    """The conversation with a lame last user message."""
    last = max((i for i, m in enumerate(messages) if m.get("role") == "user"), default=None)
    if last is None:
        raise InvalidRequest("contrast", "needs a user message")
    text = lame_text(str(messages[last].get("content")), contrast)
    return [*messages[:last], {**messages[last], "content": text}, *messages[last + 1 :]]


def _contrast(prompt: Sequence[int], contrast: ContrastParameters) -> Contrast:
    names = ("threshold", "weight", "filter_ratio")
    given = {name: getattr(contrast, name) for name in names}
    settings = UncertaintyContrast(**{k: v for k, v in given.items() if v is not None})
    return Contrast(tuple(prompt), settings)
