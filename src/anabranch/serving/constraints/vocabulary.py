"""The bytes that every token stands for, exactly as the tokenizer's decoder spells them.

A constraint is a language of bytes, and a token may hold half a character. Two families of
tokenizers say which bytes: byte-level BPE (Radford et al. 2019, section 2.2) writes each byte as
one printable character; SentencePiece with byte fallback writes a space as a bar and a byte that
no piece covers as ``<0x0A>``. Others (WordPiece, Unigram without fallback) lose bytes on the way
and are refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from anabranch.errors import UnsupportedConstraint

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_FALLBACK_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """``tokens[id]`` is the token's bytes; empty for special tokens and rows that name none."""

    tokens: tuple[bytes, ...]
    end_tokens: tuple[int, ...]
    tokenizer: Any = field(repr=False)

    @classmethod
    def of(cls, tokenizer: Any, size: int, end_tokens: tuple[int, ...]) -> Vocabulary:
        """The tokens of a transformers tokenizer for a head of ``size`` rows.

        The head may have more rows than the tokenizer has tokens: they stand for nothing and are
        never allowed. Raises :class:`UnsupportedConstraint` for tokenizers without bytes and
        models without an end token.
        """
        ends = tuple(sorted({token for token in end_tokens if 0 <= token < size}))
        if not ends:
            raise UnsupportedConstraint(
                "response_format",
                "this model has no end token, so a constrained answer could never end",
            )
        to_bytes = _byte_mapping(tokenizer)
        special = {*tokenizer.all_special_ids, *ends}
        special |= {i for i, added in tokenizer.added_tokens_decoder.items() if added.special}
        tokens = [b""] * size
        for text, token in tokenizer.get_vocab().items():
            if token < size and token not in special:
                tokens[token] = to_bytes(text)
        return cls(tuple(tokens), ends, tokenizer)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def words(self) -> int:
        """Length of a bitmask row in int32 words."""
        return -(-len(self.tokens) // 32)

    @cached_property
    def text_mask(self) -> np.ndarray:
        """``[words]``: the tokens that are text."""
        return pack([index for index, token in enumerate(self.tokens) if token], self.words)

    @cached_property
    def end_mask(self) -> np.ndarray:
        """``[words]``: the end tokens."""
        return pack(list(self.end_tokens), self.words)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for vocabularies for which compiled constraints are interchangeable."""
        digest = hashlib.sha256(repr(self.end_tokens).encode())
        for token in self.tokens:
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """Tokens whose bytes are those of a text, as the tokenizer would cut it.

        Falls back to the longest token at each place where the tokenizer adds or changes bytes,
        as SentencePiece does with the space in front of a text.
        """
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if b"".join(self.tokens[i] if i < len(self) else b"?" for i in ids) == text.encode():
            return list(ids)
        return self._longest(text.encode())

    def _longest(self, data: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(data):
            for end in range(min(len(data), at + self._longest_token), at, -1):
                if (token := self._token_of.get(data[at:end])) is not None:
                    ids.append(token)
                    at = end
                    break
            else:
                return ids  # a byte that the model cannot write
        return ids

    @cached_property
    def _token_of(self) -> dict[bytes, int]:
        # Reversed: of several tokens with the same bytes the first one is meant.
        return {token: i for i, token in reversed(list(enumerate(self.tokens))) if token}

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.tokens), default=0)


def pack(ids: list[int], words: int) -> np.ndarray:
    """A bitmask ``[words]`` int32 with these bits set."""
    bits = np.zeros(words * 32, dtype=np.uint8)
    bits[ids] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)


def unpack(row: np.ndarray) -> np.ndarray:
    """The ids whose bits a bitmask ``[words]`` sets, ascending."""
    return np.flatnonzero(np.unpackbits(row.astype("<i4").view(np.uint8), bitorder="little"))


def _byte_mapping(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoders = _decoders(json.loads(backend.to_str()).get("decoder")) if backend else []
    kinds = {decoder["type"] for decoder in decoders}
    if "ByteLevel" in kinds:
        return _byte_level
    if "ByteFallback" in kinds and _replaces_bar(decoders):
        return _byte_fallback
    raise UnsupportedConstraint(
        "response_format",
        f"the tokens of {type(tokenizer).__name__} (decoder: {', '.join(sorted(kinds)) or 'none'})"
        " do not map to bytes; constraints need byte-level BPE or SentencePiece with byte fallback",
    )


def _decoders(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [inner for each in decoder["decoders"] for inner in _decoders(each)]
    return [decoder]


def _replaces_bar(decoders: list[dict[str, Any]]) -> bool:
    return any(
        decoder["type"] == "Metaspace"
        or (decoder["type"] == "Replace" and decoder["pattern"].get("String") == _SPACE)
        for decoder in decoders
    )


def _alphabet() -> dict[str, int]:
    """Byte-level BPE's characters: printable bytes stand for themselves, others from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }


_BYTE_OF = _alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:  # an added token is written as it is
        return token.encode()


def _byte_fallback(token: str) -> bytes:
    if match := _FALLBACK_BYTE.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace(_SPACE, " ").encode()
