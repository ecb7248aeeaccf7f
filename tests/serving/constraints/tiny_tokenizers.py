"""Tokenizers with a few hundred tokens: bytes, some merges, special tokens, and holes."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from anabranch.serving.constraints import ConstraintCompiler, Whitespace

END, ROLE = "<|end|>", "<|role|>"
WORDS = [
    '{"',
    '":',
    ' "',
    '",',
    '"}',
    "true",
    "fal",
    "se",
    " {",
    "}}",
    "é",
    "日",
    "ab",
    "null",
    ": ",
    "12",
    '"a',
]
ROWS = 320
"""Rows of the head: more than there are tokens."""


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges make tokens of several bytes, also of half a character."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {c: i for i, c in enumerate(sorted(level.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        spelled = level.pre_tokenize_str(word)[0][0]
        for end in range(2, len(spelled) + 1):
            if spelled[:end] not in vocabulary:
                vocabulary[spelled[:end]] = len(vocabulary)
                merges.append((spelled[: end - 1], spelled[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = level
    tokenizer.decoder = decoders.ByteLevel()
    return _with_special(tokenizer)


@cache
def sentencepiece() -> PreTrainedTokenizerFast:
    """SentencePiece's way: a bar for the space, bytes for what no piece covers."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *'▁{}":,abtrue', "▁a"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _with_special(tokenizer, unk_token="<unk>")


@cache
def word_piece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def _with_special(tokenizer: Tokenizer, **special: Any) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([END, ROLE])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, **special)


def end_of(tokenizer: Any) -> int:
    return int(tokenizer.convert_tokens_to_ids(END))


@cache
def compiler(
    backend: str, family: str = "byte_level", whitespace: Whitespace = "spaced"
) -> ConstraintCompiler:
    """A compiler for a tiny tokenizer; the same one every time."""
    tokenizer = {"byte_level": byte_level, "sentencepiece": sentencepiece}[family]()
    rows = max(ROWS, len(tokenizer) + 3)
    return ConstraintCompiler(tokenizer, rows, (end_of(tokenizer),), backend, whitespace=whitespace)
