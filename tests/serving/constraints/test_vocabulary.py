"""Tokens are the bytes that the tokenizer's decoder makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import UnsupportedConstraint
from anabranch.serving.constraints.vocabulary import Vocabulary, pack, unpack
from tests.serving.constraints.tiny_tokenizers import (
    END,
    ROLE,
    byte_level,
    end_of,
    sentencepiece,
    word_piece,
)
from tests.tiny import byte_tokenizer


def vocabulary(tokenizer: Any, rows: int = 400) -> Vocabulary:
    return Vocabulary.of(tokenizer, rows, (end_of(tokenizer),))


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
def test_the_bytes_of_a_text_are_the_bytes_of_its_tokens(make: Any, text: str) -> None:
    known = vocabulary(make())
    assert b"".join(known.tokens[i] for i in known.encode(text)) == text.encode()


@given(ids=st.lists(st.integers(0, 255 + 20), max_size=8))
def test_tokens_decode_to_their_bytes(ids: list[int]) -> None:
    tokenizer = byte_level()
    known = vocabulary(tokenizer)
    ids = [i for i in ids if known.tokens[i]]
    written = b"".join(known.tokens[i] for i in ids)
    assert tokenizer.decode(ids) == written.decode(errors="replace")


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_special_tokens_and_rows_without_a_token_have_no_bytes(make: Any) -> None:
    tokenizer = make()
    known = vocabulary(tokenizer)
    empty = [tokenizer.convert_tokens_to_ids(t) for t in (END, ROLE)]
    for token in [*empty, *range(len(tokenizer), 400)]:
        assert known.tokens[token] == b""
        assert token not in unpack(known.text_mask)
    assert known.tokens[tokenizer.convert_tokens_to_ids("<think>")] == b"<think>"
    assert unpack(known.end_mask).tolist() == [end_of(tokenizer)]


def test_every_byte_can_be_written() -> None:
    for make in (byte_level, sentencepiece):
        tokens = set(vocabulary(make()).tokens)
        assert {bytes([byte]) for byte in range(256)} <= tokens


def test_a_head_with_fewer_rows_than_tokens_loses_the_last_ones() -> None:
    known = Vocabulary.of(byte_level(), 100, (3,))
    assert len(known) == 100 and known.words == 4
    assert unpack(known.text_mask).max() < 100


def test_tokenizers_that_lose_bytes_are_refused() -> None:
    with pytest.raises(UnsupportedConstraint, match="decoder: WordPiece"):
        Vocabulary.of(word_piece(), 3, (1,))


def test_a_model_without_an_end_is_refused() -> None:
    with pytest.raises(UnsupportedConstraint, match="no end token"):
        Vocabulary.of(byte_tokenizer(), 256, ())


def test_fingerprints_tell_vocabularies_apart() -> None:
    one, other = vocabulary(byte_level()), vocabulary(sentencepiece())
    assert one.fingerprint == vocabulary(byte_level()).fingerprint
    assert len({one.fingerprint, other.fingerprint, vocabulary(byte_level(), 401).fingerprint}) == 3


@given(st.sets(st.integers(0, 95)))
def test_masks_pack_and_unpack(ids: set[int]) -> None:
    row = pack(sorted(ids), 3)
    assert row.dtype == np.int32 and set(unpack(row).tolist()) == ids
    for token in ids:
        assert row[token // 32] >> (token % 32) & 1
