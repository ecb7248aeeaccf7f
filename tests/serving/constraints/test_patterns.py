"""A rewritten pattern matches inside every dialect's reading of the original."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InvalidConstraint, UnsupportedConstraint
from anabranch.serving.constraints.code_points import complement, intersection, ranges
from anabranch.serving.constraints.patterns import (
    literal_pattern,
    portable_pattern,
    whole_text_pattern,
)


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        (r"^\d+$", ["7"], ["\u0667", ""]),
        (r"^\w$", ["_", "a"], ["é", "-"]),
        (r"^\W$", ["-", " "], ["é", "a", "_"]),
        (r"^[^\W]$", ["_"], ["é", "-"]),
        (r"^[^\w-]$", ["+"], ["é", "-", "x"]),
        (r"^\S$", ["x", "é"], ["\ufeff", "\u00a0", "\x1c", " "]),
        (r"^\s$", ["\t", "\u3000"], ["\ufeff", "\x1c"]),
        ("^.$", ["é", "\x85"], ["\n", "\r", "\u2028"]),
        (r"^a\/b$", ["a/b"], ["a\\/b"]),
        (r"^[a&&b]$", ["&", "a", "b"], ["c"]),
        (r"^[[a]$", ["[", "a"], ["b"]),
        (r"^[a\-c]$", ["-", "a", "c"], ["b"]),
        (r"^[a-]$", ["-", "a"], ["b"]),
        (r"^\u00e9\x41\cA$", ["éA\x01"], ["eA\x01"]),
        (r"^\ud83d\ude00$", ["😀"], ["\U0001f601"]),
        (r"^(?<year>\d{4})-(?:0|1){2}$", ["2024-01"], ["2024-2", "24-01"]),
        (r"^a{2,}b??$", ["aa", "aaab"], ["a", "aabb"]),
        ("a|^b", ["xay", "bx"], ["xb"]),
        ("^{$", ["{"], ["}"]),
        ("", ["", "x"], []),
    ],
)
def test_what_a_pattern_means(pattern: str, inside: list[str], outside: list[str]) -> None:
    rewritten = re.compile(portable_pattern(pattern).replace("$", r"\Z"))
    assert all(rewritten.search(text) for text in inside), rewritten.pattern
    assert not any(rewritten.search(text) for text in outside), rewritten.pattern


@given(
    pattern=st.from_regex(r"(\^?([ab.]|\[\^?a-c\]|\\[dws])[*+?]?\$?\|?){1,3}", fullmatch=True),
    text=st.text("abcd1 _", max_size=5),
)
def test_rewriting_agrees_with_python_on_plain_patterns(pattern: str, text: str) -> None:
    expected = bool(re.search(pattern.replace("$", r"\Z"), text, re.ASCII))
    assert bool(re.search(portable_pattern(pattern).replace("$", r"\Z"), text)) == expected


@given(
    pattern=st.sampled_from(["a", "^a", "a$", "^a$", "a|^b$", "^(a|b)+$", "[^a]", ""]),
    text=st.text("ab", max_size=4),
)
def test_searches_are_spelled_out_for_matchers_of_the_whole_text(pattern: str, text: str) -> None:
    found = bool(re.search(pattern.replace("$", r"\Z"), text))
    assert bool(re.fullmatch(whole_text_pattern(pattern)[1:-1], text)) == found


def test_whole_text_patterns_never_match_what_json_escapes() -> None:
    assert not re.fullmatch(whole_text_pattern("^[^a]$")[1:-1], '"')
    with pytest.raises(UnsupportedConstraint, match="writes as an escape"):
        whole_text_pattern('^"$')
    with pytest.raises(UnsupportedConstraint, match="an anchor within"):
        whole_text_pattern("^(a|^b)$")


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("(?=a)b", "a lookahead"),
        ("(?!a)b", "a negative lookahead"),
        ("(?<=a)b", "a lookbehind"),
        ("(?<!a)b", "a negative lookbehind"),
        (r"(a)\1", "a back-reference"),
        (r"\bx", "a word boundary"),
        (r"\p{L}", "the character property"),
        (r"[\p{L}]", "the character property"),
        ("(?i)a", r"the group \(\?i"),
        (r"\ud83d", "half of a surrogate"),
        ("[]a]", "begins with ]"),
        ("a{,2}", "without its least number"),
        ("a{100001}", "more than 100000 repeats"),
    ],
)
def test_constructs_without_a_common_meaning_are_named(pattern: str, named: str) -> None:
    with pytest.raises(UnsupportedConstraint, match=named):
        portable_pattern(pattern)


@pytest.mark.parametrize("pattern", ["(", ")", "[a", "*a", "a**", "a{2,1}", "\\", "[b-a]", r"\x4"])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidConstraint, match="is no pattern"):
        portable_pattern(pattern)


@given(st.text(max_size=8))
def test_a_literal_matches_itself_only(text: str) -> None:
    pattern = re.compile(literal_pattern(text))
    assert pattern.fullmatch(text)
    assert not pattern.fullmatch(text + "x")


_RANGES = st.lists(
    st.tuples(st.integers(0, 200), st.integers(0, 20)).map(lambda p: (p[0], p[0] + p[1])),
    max_size=5,
).map(ranges)


@given(_RANGES, _RANGES)
def test_sets_of_code_points(one: object, other: object) -> None:
    def points(members: object) -> set[int]:
        return {p for first, last in members for p in range(first, min(last, 400) + 1)}  # type: ignore[attr-defined]

    assert points(intersection(one, other)) == points(one) & points(other)  # type: ignore[arg-type]
    assert points(complement(one)) == set(range(401)) - points(one)  # type: ignore[arg-type]
