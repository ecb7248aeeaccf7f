"""Turns sampled tokens into text as they come, and finds stop strings in it.

A character may take several tokens, so text is only released once it is complete; the beginning
of a possible stop string is held back until it is clear that it is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_INCOMPLETE = 8
"""Tokens after which text is released even if it seems to end within a character. Without a bound
a stream of invalid bytes would be decoded again and again from its start."""
MAX_PARTIAL = 3
"""A character of UTF-8 has at most 4 bytes, so its beginning fits in this many tokens."""
CONTEXT = 6
"""Prompt tokens decoded before the output: some tokenizers drop a space at the very start."""


class Detokenizer:
    """Text of one sequence, released piece by piece. ``stopped`` once a stop string was found."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-CONTEXT:])
        self._prefix = 0  # the text of tokens [prefix, read) has been taken over
        self._read = len(self._tokens)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that can be shown because of it, often empty."""
        self._tokens.append(token)
        end = self._complete()
        if end == self._read:
            return ""
        text = self._new_text(end)
        self._prefix, self._read = self._read, end
        return self._release(text)

    def finish(self) -> str:
        """The text still held back, once no more tokens come."""
        if self.stopped:
            return ""
        released = self._release(self._new_text(len(self._tokens)))
        held, self._held = self._held, ""
        return released + held

    def _complete(self) -> int:
        """Number of tokens whose text cannot change any more."""
        end = len(self._tokens)
        if not self._new_text(end).endswith(REPLACEMENT):
            return end
        # Either a character is incomplete or these bytes are none. Long runs are cut where it
        # makes no difference to their text, so never within a character.
        if end - self._read > MAX_PARTIAL:
            text = self._decode(self._prefix, end)
            for cut in range(end - MAX_PARTIAL, end):
                if self._decode(self._prefix, cut) + self._decode(cut, end) == text:
                    return cut
        return self._read if end - self._read < MAX_INCOMPLETE else end

    def _new_text(self, end: int) -> str:
        known = self._decode(self._prefix, self._read)
        return self._decode(self._prefix, end)[len(known) :]

    def _release(self, text: str) -> str:
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        end = len(self._held) - self._ambiguous()
        shown, self._held = self._held[:end], self._held[end:]
        return shown

    def _ambiguous(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stop), default=0)
        for length in range(min(longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0

    def _decode(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(
            self._tokens[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
