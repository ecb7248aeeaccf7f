"""Sets of code points as sorted ranges, for character classes."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterable
from functools import cache

Ranges = tuple[tuple[int, int], ...]
"""Disjoint ``(first, last)`` in ascending order."""

_SURROGATES = (0xD800, 0xDFFF)
"""Halves of UTF-16 pairs: no text contains them."""


def ranges(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """The union of ranges in any order."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(pairs):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(merged[-1][1], last)
        else:
            merged.append((first, last))
    return tuple(merged)


def complement(members: Ranges) -> Ranges:
    """All other code points, surrogates excepted."""
    gaps, start = [], 0
    for first, last in ranges((*members, _SURROGATES)):
        if first > start:
            gaps.append((start, first - 1))
        start = last + 1
    return (*gaps, (start, sys.maxunicode)) if start <= sys.maxunicode else tuple(gaps)


def intersection(one: Ranges, other: Ranges) -> Ranges:
    """The code points of both."""
    return complement(ranges((*complement(one), *complement(other))))


def characters(text: str) -> Ranges:
    """The characters of a text."""
    return ranges((ord(c), ord(c)) for c in text)


ASCII_DIGITS: Ranges = ((0x30, 0x39),)
ASCII_WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
LINE_ENDS = characters("\n\r\u2028\u2029")
SPACES = ranges(
    (*characters("\t\n\v\f\r \u00a0\u1680\u2028\u2029\u202f\u205f\u3000"), (0x2000, 0x200A))
)
"""What every dialect calls white space."""
SPACES_ANYWHERE = ranges((*SPACES, *characters("\u0085\ufeff"), (0x1C, 0x1F)))
"""What at least one dialect calls white space."""


@cache
def digits_anywhere() -> Ranges:
    """What at least one dialect calls a digit."""
    return _where(lambda c: unicodedata.category(c) == "Nd")


@cache
def words_anywhere() -> Ranges:
    """What at least one dialect calls a word character."""
    return _where(
        lambda c: c == "_" or c.isalnum() or unicodedata.category(c) in ("Mn", "Mc", "Pc")
    )


def _where(test: Callable[[str], bool]) -> Ranges:
    return ranges((p, p) for p in range(sys.maxunicode + 1) if test(chr(p)))
