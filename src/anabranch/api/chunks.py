"""Turns deltas into the bytes of server-sent events.

This runs once for every token of every stream, so the constant part of a chunk is formatted once
a stream and only the text is encoded. Non-ASCII is escaped: some clients split lines at U+2028.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as quote
from typing import Any, Protocol

from anabranch.models.protocol import OutputDelta, TokenLogprob

DONE = b"data: [DONE]\n\n"


class Chunks(Protocol):
    """The chunks of one stream."""

    def first(self, choice: int) -> str:
        """What opens a choice; may be empty."""

    def delta(self, choice: int, delta: OutputDelta) -> str:
        """One or two events, or nothing if the delta has nothing to show."""

    def usage(self, usage: dict[str, Any]) -> str:
        """The last chunk, if usage was asked for."""


class _Frame:
    """The parts of a chunk that are the same throughout a stream."""

    def __init__(self, head: dict[str, Any], include_usage: bool) -> None:
        self._head = json.dumps(head)[:-1]
        self.start = f'data: {self._head}, "choices": [{{"index": '
        self.end = '}], "usage": null}\n\n' if include_usage else "}]}\n\n"

    def usage(self, usage: dict[str, Any]) -> str:
        return f'data: {self._head}, "choices": [], "usage": {json.dumps(usage)}}}\n\n'


class ChatChunks:
    """Chunks of ``/v1/chat/completions``. ``head``: id, object, created, model, fingerprint."""

    def __init__(self, head: dict[str, Any], include_usage: bool) -> None:
        self._frame = _Frame(head, include_usage)
        self.usage = self._frame.usage

    def first(self, choice: int) -> str:
        """The assistant's role."""
        return self._chunk(choice, '{"role": "assistant", "content": ""}')

    def delta(self, choice: int, delta: OutputDelta) -> str:
        """The text, then a chunk of its own for the finish reason, as clients expect it."""
        text = ""
        if delta.text or delta.logprobs:
            text = self._chunk(choice, f'{{"content": {quote(delta.text)}}}', delta.logprobs)
        if delta.finish_reason is not None:
            text += self._chunk(choice, "{}", reason=delta.finish_reason)
        return text

    def _chunk(
        self,
        choice: int,
        delta: str,
        tokens: Sequence[TokenLogprob] = (),
        reason: str | None = None,
    ) -> str:
        """One event; ``delta`` is JSON text."""
        logprobs = json.dumps(chat_logprobs(tokens)) if tokens else "null"
        finish_reason = f'"{reason}"' if reason else "null"
        return (
            f'{self._frame.start}{choice}, "delta": {delta}, "logprobs": {logprobs}, '
            f'"finish_reason": {finish_reason}{self._frame.end}'
        )


class CompletionChunks:
    """Chunks of ``/v1/completions``. ``echoes`` holds what is put before each choice."""

    def __init__(
        self, head: dict[str, Any], include_usage: bool, choices: int, echoes: list[str]
    ) -> None:
        self._frame = _Frame(head, include_usage)
        self.usage = self._frame.usage
        self._echoes = echoes
        self._logprobs = [LogprobColumns() for _ in range(choices)]

    def first(self, choice: int) -> str:
        """The prompt, if it is echoed."""
        return self._chunk(choice, self._echoes[choice], "null", "null") if self._echoes else ""

    def delta(self, choice: int, delta: OutputDelta) -> str:
        """Text, log-probabilities and finish reason together."""
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return ""
        logprobs = "null"
        if delta.logprobs:
            logprobs = json.dumps(self._logprobs[choice].columns(delta.logprobs))
        reason = f'"{delta.finish_reason}"' if delta.finish_reason else "null"
        return self._chunk(choice, delta.text, logprobs, reason)

    def _chunk(self, choice: int, text: str, logprobs: str, reason: str) -> str:
        return (
            f'{self._frame.start}{choice}, "text": {quote(text)}, "logprobs": {logprobs}, '
            f'"finish_reason": {reason}{self._frame.end}'
        )


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """OpenAI's shape for chat: one object a token."""
    content = [
        {**_token(token), "top_logprobs": [_token(other) for other in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


class LogprobColumns:
    """OpenAI's shape for completions: four parallel lists. Remembers the offset in the text."""

    def __init__(self) -> None:
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def columns(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The next tokens of the choice."""
        offsets, top = [], []
        for token in tokens:
            offsets.append(self._offset)
            # A token may hold part of a character: only complete ones move the offset.
            self._offset += len(self._decoder.decode(token.bytes))
            likely = {token.token: _number(token.logprob)}
            for other in token.top:
                likely.setdefault(other.token, _number(other.logprob))
            top.append(likely)
        return {
            "tokens": [token.token for token in tokens],
            "token_logprobs": [_number(token.logprob) for token in tokens],
            "top_logprobs": top,
            "text_offset": offsets,
        }


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.token,
        "bytes": list(token.bytes),
        "logprob": _number(token.logprob),
    }


def _number(logprob: float) -> float:
    """JSON has no minus infinity; OpenAI writes -9999."""
    return logprob if logprob > -9999.0 else -9999.0
