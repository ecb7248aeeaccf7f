"""Text as it comes against text decoded at once, down to single bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from anabranch.serving.detokenizer import REPLACEMENT, Detokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = "<|end|>"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, a few merges, some of which end within a character, a special token."""
    # Ġ is a space; ð Ł ĺ stand for F0 9F 98, with which most smileys begin; Ã for C3.
    merges = [("a", "b"), ("Ġ", "a"), ("Ġ", "ð"), ("Ł", "ĺ"), ("ab", "Ã")]
    words = [*BYTES, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZER = make_tokenizer()
SPECIAL_ID = TOKENIZER.convert_tokens_to_ids(SPECIAL)

letters = st.text(alphabet="abc", max_size=20)
unicode_text = st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("ab é€😀")))
stop_strings = st.lists(
    st.one_of(
        st.text(alphabet="abc", min_size=1, max_size=4),
        st.text(alphabet="ab é€😀", min_size=1, max_size=3),
    ),
    max_size=3,
)
any_tokens = st.lists(
    st.one_of(
        st.integers(0, len(TOKENIZER) - 1),
        st.sampled_from(TOKENIZER.encode("😀😀é€", add_special_tokens=False)),
    ),
    max_size=60,
)


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def decode(tokens: Iterable[int]) -> str:
    return TOKENIZER.decode(list(tokens), skip_special_tokens=True)


def stream(tokens: Iterable[int], stop: tuple[str, ...] = (), prompt: str = "") -> list[str]:
    """Pieces as the engine gets them: until a stop string is found, then the rest."""
    detokenizer = Detokenizer(TOKENIZER, encode(prompt), stop)
    pieces = []
    for token in tokens:
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped:
            return pieces
    return [*pieces, detokenizer.finish()]


def contains_another(stop: Iterable[str]) -> bool:
    """Whether a stop string lies within another one, other than at its start.

    Then the one inside may be complete before the outer one that began earlier.
    """
    return any(inner in outer[1:] for inner in stop for outer in stop)


class TestText:
    @given(prompt=unicode_text, text=unicode_text)
    def test_pieces_add_up_to_the_text(self, prompt: str, text: str) -> None:
        pieces = stream(encode(text), prompt=prompt)
        assert "".join(pieces) == decode(encode(text)) == text

    @given(text=unicode_text)
    def test_no_piece_ends_within_a_character(self, text: str) -> None:
        assume(REPLACEMENT not in text)
        detokenizer, shown, tokens = Detokenizer(TOKENIZER, ()), "", encode(text)
        for count, token in enumerate(tokens, start=1):
            shown += detokenizer.push(token)
            complete = decode(tokens[:count]).rstrip(REPLACEMENT)
            assert complete.startswith(shown)

    @given(text=unicode_text)
    def test_complete_characters_are_not_held_back(self, text: str) -> None:
        assume(REPLACEMENT not in text)
        detokenizer, shown, tokens = Detokenizer(TOKENIZER, ()), "", encode(text)
        for count, token in enumerate(tokens, start=1):
            shown += detokenizer.push(token)
            so_far = decode(tokens[:count])
            if not so_far.endswith(REPLACEMENT):
                assert shown == so_far

    def test_an_emoji_is_released_with_its_last_token(self) -> None:
        tokens = [TOKENIZER.convert_tokens_to_ids(piece) for piece in ("ð", "Ł", "ĺ", "Ģ")]
        assert stream(tokens) == ["", "", "", "\N{GRINNING FACE}", ""]

    def test_nothing_gives_nothing(self) -> None:
        assert stream([]) == [""]

    def test_an_incomplete_character_at_the_end_becomes_a_replacement(self) -> None:
        tokens = encode("x\N{GRINNING FACE}")[:-1]
        assert "".join(stream(tokens)) == "x" + REPLACEMENT


class TestInvalidBytes:
    @settings(max_examples=300)
    @given(tokens=any_tokens)
    @example(tokens=[BYTES.index("Ģ")] * 7 + encode("\N{GRINNING FACE}"))
    @example(tokens=[*encode("\N{GRINNING FACE}")[:2], SPECIAL_ID, *encode("\N{GRINNING FACE}")])
    def test_any_tokens_add_up_to_their_text(self, tokens: list[int]) -> None:
        assert "".join(stream(tokens)) == decode(tokens)

    @given(tokens=any_tokens)
    def test_little_is_held_back(self, tokens: list[int]) -> None:
        """Without stop strings, what is not yet shown is no more than a few tokens."""
        detokenizer, shown = Detokenizer(TOKENIZER, ()), ""
        for count, token in enumerate(tokens, start=1):
            shown += detokenizer.push(token)
            assert len(decode(tokens[:count])) - len(shown) <= 16

    @pytest.mark.parametrize("piece", ["Ģ", "ð", "ÿ"])
    def test_a_long_run_becomes_replacement_characters(self, piece: str) -> None:
        tokens = [TOKENIZER.convert_tokens_to_ids(piece)] * 500
        assert "".join(stream(tokens)) == REPLACEMENT * 500

    @pytest.mark.parametrize(
        "tokens",
        [
            [TOKENIZER.convert_tokens_to_ids("ÿ")],
            [TOKENIZER.convert_tokens_to_ids("ð"), TOKENIZER.convert_tokens_to_ids("Ł")],
            [SPECIAL_ID],
            encode("a"),
            encode("\N{GRINNING FACE}"),
            [*encode("\N{GRINNING FACE}")[:3], SPECIAL_ID],
            encode(REPLACEMENT),
        ],
        ids=["invalid", "truncated", "special", "letter", "emoji", "special within", "replacement"],
    )
    @pytest.mark.parametrize("stop", [(), ("zzz",)])
    def test_the_cost_of_a_token_is_bounded(self, tokens: list[int], stop: tuple[str, ...]) -> None:
        class Counting:
            decoded = 0

            def decode(self, ids: list[int], **options: Any) -> str:
                self.decoded += len(ids)
                return TOKENIZER.decode(ids, **options)

        counting = Counting()
        detokenizer = Detokenizer(counting, encode("prompt"), stop)
        for i in range(2000):
            detokenizer.push(tokens[i % len(tokens)])
        detokenizer.finish()
        assert counting.decoded <= 64 * 2000


class TestStopStrings:
    @settings(max_examples=300)
    @given(text=st.one_of(letters, unicode_text), stop=stop_strings)
    def test_the_text_ends_before_the_earliest(self, text: str, stop: list[str]) -> None:
        assume(not contains_another(stop))
        found = [text.find(s) for s in stop if s in text]
        expected = text[: min(found)] if found else text
        assert "".join(stream(encode(text), tuple(stop))) == expected

    @given(text=letters, stop=stop_strings)
    def test_with_one_within_another_the_text_still_ends_before_one(
        self, text: str, stop: list[str]
    ) -> None:
        shown = "".join(stream(encode(text), tuple(stop)))
        assert not any(s in shown for s in stop)
        assert shown == text or any(text.startswith(shown + s) for s in stop)

    @given(text=st.one_of(letters, unicode_text), stop=stop_strings)
    def test_nothing_is_released_that_could_begin_one(self, text: str, stop: list[str]) -> None:
        """Whatever comes next, text once shown is never part of a stop string."""
        detokenizer, shown, tokens = Detokenizer(TOKENIZER, (), tuple(stop)), "", encode(text)
        for count, token in enumerate(tokens, start=1):
            shown += detokenizer.push(token)
            if detokenizer.stopped:
                return
            so_far = decode(tokens[:count])
            for beginning in (s[:length] for s in stop for length in range(1, len(s))):
                assert not so_far.endswith(beginning) or len(shown) <= len(so_far) - len(beginning)

    @given(text=letters, stop=stop_strings)
    def test_only_a_beginning_of_one_is_held_back(self, text: str, stop: list[str]) -> None:
        detokenizer, shown, tokens = Detokenizer(TOKENIZER, (), tuple(stop)), "", encode(text)
        for count, token in enumerate(tokens, start=1):
            shown += detokenizer.push(token)
            if detokenizer.stopped:
                return
            so_far = decode(tokens[:count])
            if not so_far.endswith(REPLACEMENT):
                held = so_far.removeprefix(shown)
                assert not held or any(s.startswith(held) for s in stop)

    def test_finish_releases_a_beginning_that_came_to_nothing(self) -> None:
        assert stream(encode("xab"), ("abc",))[-1] != ""
        assert "".join(stream(encode("xab"), ("abc",))) == "xab"

    def test_stopped_tells_whether_one_was_found(self) -> None:
        detokenizer = Detokenizer(TOKENIZER, (), ("b",))
        detokenizer.push(encode("a")[0])
        assert not detokenizer.stopped
        assert detokenizer.push(encode("b")[0]) == "" and detokenizer.stopped
        assert detokenizer.finish() == ""

    def test_one_that_only_finish_completes_is_found(self) -> None:
        """The last bytes are released as a replacement character, for which somebody waited."""
        detokenizer = Detokenizer(TOKENIZER, (), ("a" + REPLACEMENT,))
        shown = detokenizer.push(encode("a")[0]) + detokenizer.push(BYTES.index("ð"))
        assert shown + detokenizer.finish() == "" and detokenizer.stopped

    @pytest.mark.parametrize("stop", [("b", "a"), ("a", "b"), ("b", "ab")])
    def test_of_two_in_one_token_the_first_counts(self, stop: tuple[str, ...]) -> None:
        (token,) = encode("ab")
        assert stream([token], stop) == [""]

    def test_the_prompt_is_never_part_of_one(self) -> None:
        assert "".join(stream(encode("b"), ("ab",), prompt="a")) == "b"
