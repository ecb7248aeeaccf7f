"""From a rendered row to tokens, with an exact mask of what the loss counts.

A conversation is tokenised piece by piece, cut where an assistant turn begins and ends::

    <user>Hi</user><assistant> | Hello!</assistant> | <user>Bye</user><assistant> | Bye!</assistant>
    not trained                | trained            | not trained                 | trained

The cuts come from the chat template itself, by rendering every prefix of the conversation. So the
tokens before an answer are those that a server computes for the same question, whatever the
template looks like, and a template that rewrites earlier turns is refused and not guessed at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.errors import ConfigurationError
from anabranch.training.errors import DataError
from anabranch.training.example import Example
from anabranch.training.task import Message, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% elif message.role == 'assistant' %}{{ message.content }}{{ eos_token }}"
    "{% else %}"
    "{% if loop.first %}Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.\n\n{% endif %}"
    "{% if loop.index0 and messages[loop.index0 - 1].role == 'assistant' %}\n\n{% endif %}"
    "### Instruction:\n{{ message.content }}\n\n"
    "{% if not loop.last or add_generation_prompt %}### Response:\n{% endif %}"
    "{% endif %}{% endfor %}"
)
"""The prompt of Stanford Alpaca (2023); its optional input is part of the instruction here."""

RAW = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}"
    "{% else %}{{ '\n' }}{% endif %}{% endfor %}"
)
"""Turns one after the other on lines of their own."""


class Template:
    """Makes :class:`Example` objects from rendered rows, and prompts from conversations.

    ``name`` is ``chat`` (the tokenizer's own template), ``alpaca``, ``raw`` or a ``.jinja`` file.
    ``end_tokens`` are the ids that end an answer, besides the tokenizer's own.
    """

    def __init__(
        self, name: str, tokenizer: PreTrainedTokenizerBase, end_tokens: Sequence[int] = ()
    ) -> None:
        self._tokenizer: Any = tokenizer
        self._jinja = _source(name, tokenizer)
        self._end = set(end_tokens)
        if tokenizer.eos_token_id is not None:
            self._end.add(int(tokenizer.eos_token_id))
        # SentencePiece puts a space before the first word of a text: pieces would not add up.
        first = tokenizer.convert_ids_to_tokens(self._ids("a"))[:1]
        self._whole = bool(first) and str(first[0]).startswith("\u2581")
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
        self._begin: list[int] = [int(bos)] if adds_bos else []

    def example(self, rendered: Rendered, task: str = "", source: str = "") -> Example:
        """Tokens and mask of one text. Raises :class:`DataError` naming ``source``."""
        if not rendered.messages:
            return self._plain(rendered.text, task, source)
        try:
            pieces = list(self._pieces(rendered.messages, rendered.untrained))
        except DataError as error:
            raise DataError(f"{source}: {error}" if source else str(error)) from error
        tokens: list[int] = []
        trained: list[bool] = []
        for ids, answer in self._tokenised(pieces):
            tokens += ids
            trained += self._counted(ids) if answer else [False] * len(ids)
        if tokens and trained[-1] and tokens[-1] not in self._end:
            self._append_end(tokens, trained)
        return _example(tokens, trained, task, source)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens after which the model answers."""
        return self._ids(self._render(messages, answer_next=True))

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as text, special ones included."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    @property
    def end_tokens(self) -> list[int]:
        """Ids at which an answer ends, sorted."""
        return sorted(self._end)

    def _plain(self, text: str, task: str, source: str) -> Example:
        ids = self._ids(text)
        tokens, trained = [*self._begin, *ids], [False] * len(self._begin) + [True] * len(ids)
        if tokens:
            self._append_end(tokens, trained)
        return _example(tokens, trained, task, source)

    def _append_end(self, tokens: list[int], trained: list[bool]) -> None:
        if (eos := self._tokenizer.eos_token_id) is not None:
            tokens.append(int(eos))
            trained.append(True)

    def _pieces(
        self, messages: Sequence[Message], untrained: frozenset[int]
    ) -> Iterator[tuple[str, bool]]:
        """The conversation's text in pieces, each with whether it is an answer to learn."""
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], answer_next=True)
            after = self._render(messages[: index + 1], answer_next=False)
            if not before.startswith(done) or not after.startswith(before):
                raise DataError(
                    f"turn {index + 1} of the conversation changes the text before it under this "
                    f"chat template, so what the model was given when it answered is not part of "
                    f"the whole; use rows with a single answer, or template: alpaca"
                )
            yield before[len(done) :], False
            yield after[len(before) :], index not in untrained
            done = after

    def _render(self, messages: Sequence[Message], answer_next: bool) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=self._jinja,
                tokenize=False,
                add_generation_prompt=answer_next,
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses the conversation: {error}") from error
        return str(text)

    def _tokenised(self, pieces: Sequence[tuple[str, bool]]) -> Iterator[tuple[list[int], bool]]:
        if not self._whole:
            for text, answer in pieces:
                yield self._ids(text), answer
            return
        encoded = self._tokenizer(
            "".join(text for text, _ in pieces),
            add_special_tokens=False,
            return_offsets_mapping=True,
        )
        tokens = iter(zip(encoded.input_ids, encoded.offset_mapping, strict=True))
        end, waiting = 0, next(tokens, None)
        for text, answer in pieces:
            end += len(text)
            ids = []
            # A token belongs to the piece in which it ends: one that crosses is predicted there.
            while waiting is not None and waiting[1][1] <= end:
                ids.append(waiting[0])
                waiting = next(tokens, None)
            yield ids, answer

    def _counted(self, answer: Sequence[int]) -> list[bool]:
        """An answer counts up to its end token; a server stops there, before a closing newline."""
        ends = [position for position, token in enumerate(answer) if token in self._end]
        last = ends[-1] if ends else len(answer) - 1
        return [position <= last for position in range(len(answer))]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)


def _example(tokens: list[int], trained: list[bool], task: str, source: str) -> Example:
    if trained:
        trained[0] = False  # nothing precedes it
    return Example(tokens, trained, task, source)


def _source(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if name == "alpaca":
        return ALPACA
    if name == "raw":
        return RAW
    if name == "chat":
        if not isinstance(tokenizer.chat_template, str):
            raise ConfigurationError(
                "template: chat needs a base whose tokenizer has one chat template; this one has "
                "none (or several); use alpaca, raw or a .jinja file"
            )
        return tokenizer.chat_template
    return check_jinja(Path(name))


def check_jinja(path: Path) -> str:
    """The text of a template file; :class:`ConfigurationError` if it is missing or malformed."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        source = path.read_text("utf-8")
        Environment(autoescape=False, extensions=["jinja2.ext.loopcontrols"]).parse(
            source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        )
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"template: {path} cannot be read: {error}") from error
    except TemplateSyntaxError as error:
        raise ConfigurationError(f"template: {path}:{error.lineno}: {error.message}") from error
    return source
