"""Turns deltas into server-sent events of an answer that may hold calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from anabranch.api.chunks import ChatChunks
from anabranch.api.tools.reader import ArgumentsPiece, CallPiece, CallReader, Piece
from anabranch.models.protocol import OutputDelta


class CallChunks(ChatChunks):
    """Chunks of ``/v1/chat/completions`` with tools; ``readers`` has one for each choice."""

    def __init__(
        self, head: dict[str, Any], include_usage: bool, readers: Sequence[CallReader]
    ) -> None:
        super().__init__(head, include_usage)
        self._readers = readers

    def first(self, choice: int) -> str:
        """The assistant's role; there may never be any content."""
        return self._chunk(choice, '{"role": "assistant", "content": null}')

    def delta(self, choice: int, delta: OutputDelta) -> str:
        """What is certain by now: text, the head of a call, more of its arguments."""
        reader, reason = self._readers[choice], delta.finish_reason
        pieces = reader.feed(delta.text)
        if reason is not None:
            pieces += reader.end()
        shown = [json.dumps(_shape(piece)) for piece in pieces]
        if delta.logprobs and not shown:
            shown = ["{}"]  # tokens of a call's markup have log-probabilities too
        events = [self._chunk(choice, each, delta.logprobs) for each in shown[:1]]
        events += [self._chunk(choice, each) for each in shown[1:]]
        if reason is not None:
            events.append(self._chunk(choice, "{}", reason=reader.finish_reason(reason)))
        return "".join(events)


def _shape(piece: Piece) -> dict[str, Any]:
    match piece:
        case CallPiece(index, name, id):
            function = {"name": name, "arguments": ""}
            call = {"index": index, "id": id, "type": "function", "function": function}
            return {"tool_calls": [call]}
        case ArgumentsPiece(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
    return {"content": piece.text}
