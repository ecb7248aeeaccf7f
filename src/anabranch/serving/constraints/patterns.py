"""Regular expressions in the part of the syntax that means the same everywhere.

A schema's ``pattern`` is ECMA-262, validators apply the dialect of their own language, and each
back-end has another one: ``\\d`` may or may not have Arabic digits, ``[a-z&&[^b]]`` is a set of
characters or an intersection. :func:`portable_pattern` rewrites a pattern to one whose language is
inside that of every dialect, so that an answer is valid whoever checks it. What has no such
rewriting (lookarounds, back-references, properties) is refused by name.
"""

from __future__ import annotations

import re
from functools import cache

from anabranch.errors import InvalidConstraint, UnsupportedConstraint
from anabranch.serving.constraints.code_points import (
    ASCII_DIGITS,
    ASCII_WORD,
    LINE_ENDS,
    SPACES,
    SPACES_ANYWHERE,
    Ranges,
    complement,
    digits_anywhere,
    intersection,
    ranges,
    words_anywhere,
)

MAX_REPEATS = 100_000
_QUANTIFIER = re.compile(r"\{(\d+)(,(\d*))?\}")
_GROUP_NAME = re.compile(r"\?P?<([A-Za-z_][A-Za-z0-9_]*)>")
_CONTROL = {"t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r", "0": "\0"}
_META = frozenset(r"\^$.|?*+()[]{}/-&~#")
_UNESCAPED = complement(ranges(((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F))))
"""Characters that a JSON string holds as they are."""
_LOOKAROUND = {
    "?=": "a lookahead",
    "?!": "a negative lookahead",
    "?<=": "a lookbehind",
    "?<!": "a negative lookbehind",
}


def portable_pattern(pattern: str, field: str = "response_format") -> str:
    """A pattern for any back-end, without lazy quantifiers, names and shorthand classes.

    ``field`` is where the pattern stands, for messages. Raises :class:`InvalidConstraint` if it is
    none, and :class:`UnsupportedConstraint` if it has a construct outside the common part.
    """
    return _Rewriter(pattern, field).whole()


def whole_text_pattern(pattern: str, field: str = "response_format") -> str:
    """A pattern for the whole of a JSON string as it is written, for back-ends without a search.

    ``pattern`` may match anywhere in the text; in the result that is spelled out. Characters that
    JSON writes as escapes are taken out of every class. Raises :class:`UnsupportedConstraint` for
    such a character by itself, and for an anchor within the pattern.
    """
    rewriter = _Rewriter(pattern, field, within=_UNESCAPED)
    return f"^(?:{'|'.join(rewriter.searches())})$"


def literal_pattern(text: str) -> str:
    """The pattern that only this text matches."""
    return "".join(map(_literal, text))


class _Rewriter:
    """Reads a pattern once from left to right and writes it again."""

    def __init__(self, pattern: str, field: str, within: Ranges | None = None) -> None:
        self._text = pattern
        self._at = 0
        self._field = field
        self._within = within
        self._anchors = True  # allowed here

    def whole(self) -> str:
        rewritten = self._alternatives()
        if self._at < len(self._text):
            raise self._invalid("a ) without its (")
        return rewritten

    def searches(self) -> list[str]:
        """Each alternative with what may stand before and after it."""
        anything = f"{_written(_UNESCAPED)}*"
        branches = []
        while True:
            before = "" if self._take("^") else anything
            self._anchors = False
            parts, after = [], anything
            while self._at < len(self._text) and self._peek() not in "|)":
                if self._text[self._at :].split("|")[0] == "$":
                    self._next()
                    after = ""
                else:
                    parts.append(self._repeated())
            branches.append(f"{before}{''.join(parts)}{after}")
            if not self._take("|"):
                break
        if self._at < len(self._text):
            raise self._invalid("a ) without its (")
        return branches

    def _alternatives(self) -> str:
        branches = [self._sequence()]
        while self._take("|"):
            branches.append(self._sequence())
        return "|".join(branches)

    def _sequence(self) -> str:
        parts = []
        while self._at < len(self._text) and self._peek() not in "|)":
            parts.append(self._repeated())
        return "".join(parts)

    def _repeated(self) -> str:
        if self._peek() in "*+?":
            raise self._invalid(f"{self._peek()} repeats nothing")
        anchor = self._peek() in "^$"
        atom = self._atom()
        quantifier = self._quantifier()
        if quantifier and anchor:
            raise self._invalid("an anchor is repeated")
        if self._at < len(self._text) and self._peek() in "*+?":
            raise self._invalid("a quantifier is repeated")
        return atom + quantifier

    def _quantifier(self) -> str:
        if self._at >= len(self._text):
            return ""
        if re.match(r"\{,\d+\}", self._text[self._at :]):
            raise self._unsupported("a repeat without its least number")
        if self._peek() in "*+?":
            quantifier = self._next()
        elif match := _QUANTIFIER.match(self._text, self._at):
            least, most = int(match[1]), int(match[3]) if match[3] else None
            if most is not None and most < least:
                raise self._invalid(f"{match[0]} is empty")
            if max(least, most or 0) > MAX_REPEATS:
                raise self._unsupported(f"more than {MAX_REPEATS} repeats")
            quantifier = match[0]
            self._at = match.end()
        else:
            return ""
        # Lazy or greedy is how a match is searched; the language is the same.
        self._take("?")
        # xgrammar 0.2 gets "(a+b)?" wrong, and this right.
        return "{0,1}" if quantifier == "?" else quantifier

    def _atom(self) -> str:
        character = self._next()
        if character == "(":
            return self._group()
        if character == "[":
            return self._class()
        if character == "\\":
            return self._escape()
        if character == ".":
            return self._one_of(complement(LINE_ENDS))
        if character in "^$":
            if not self._anchors:
                raise self._unsupported("an anchor within it")
            return character
        return self._one_of(((ord(character), ord(character)),))

    def _one_of(self, members: Ranges) -> str:
        """A class as it is written, within the characters that may occur."""
        if self._within is not None:
            members = intersection(members, self._within)
            if not members:
                raise self._unsupported("a character that JSON writes as an escape")
        return _written(members)

    def _group(self) -> str:
        if self._text.startswith("?", self._at):
            for opening, name in sorted(_LOOKAROUND.items(), key=lambda item: -len(item[0])):
                if self._text.startswith(opening, self._at):
                    raise self._unsupported(name)
            match = _GROUP_NAME.match(self._text, self._at)
            if match is None and not self._text.startswith("?:", self._at):
                raise self._unsupported(f"the group ({self._text[self._at : self._at + 3]}")
            self._at = match.end() if match else self._at + 2
        inner = self._alternatives()
        if not self._take(")"):
            raise self._invalid("a ( without its )")
        return f"(?:{inner})"

    def _escape(self) -> str:
        character = self._peek() if self._at < len(self._text) else ""
        if character in ("b", "B"):
            raise self._unsupported("a word boundary")
        if character in "123456789" and character:
            raise self._unsupported("a back-reference")
        return self._one_of(self._escaped())

    def _class(self) -> str:
        negated = self._take("^")
        if self._text.startswith("]", self._at):
            raise self._unsupported("a class that begins with ]")
        plain: list[tuple[int, int]] = []
        others: list[Ranges] = []
        """For each shorthand in a negated class what no dialect counts to it."""
        while not self._take("]"):
            if self._at >= len(self._text):
                raise self._invalid("a [ without its ]")
            first = self._member(negated, others)
            if self._is_range() and len(first) == 1 and first[0][0] == first[0][1]:
                self._next()
                last = self._member(negated, others)
                if len(last) != 1 or last[0][0] != last[0][1] or last[0][0] < first[0][0]:
                    raise self._invalid("a range of characters in the wrong order")
                plain.append((first[0][0], last[0][0]))
            else:
                plain += first
        members = ranges(plain)
        if not negated:
            return self._one_of(members)
        members = complement(members)
        for other in others:
            members = intersection(members, other)
        return self._one_of(members)

    def _is_range(self) -> bool:
        rest = self._text[self._at : self._at + 2]
        return len(rest) == 2 and rest[0] == "-" and rest[1] != "]"

    def _member(self, negated: bool, others: list[Ranges]) -> Ranges:
        character = self._next()
        if character != "\\":
            return ((ord(character), ord(character)),)
        if self._take("b"):
            return ((8, 8),)
        shorthand = self._text[self._at : self._at + 1]
        if negated and shorthand and shorthand in "dDwWsS":
            self._next()
            others.append(_shorthand(shorthand.swapcase()))
            return ()
        return self._escaped()

    def _escaped(self) -> Ranges:
        """The characters that an escape means; the backslash has been read."""
        if self._at >= len(self._text):
            raise self._invalid("it ends with a backslash")
        character = self._next()
        if character in "dDwWsS":
            return _shorthand(character)
        if character in "pP":
            raise self._unsupported(f"the character property \\{character}")
        if character == "0" and self._text[self._at : self._at + 1].isdigit():
            raise self._unsupported("an octal escape")
        if character in _CONTROL:
            point = ord(_CONTROL[character])
        elif character == "c" and re.match("[A-Za-z]", self._text[self._at : self._at + 1]):
            point = ord(self._next()) % 32
        elif character == "x":
            point = self._hexadecimal(2)
        elif character == "u":
            point = self._code_unit()
        elif character.isalnum():
            raise self._unsupported(f"the escape \\{character}")
        else:
            point = ord(character)
        return ((point, point),)

    def _code_unit(self) -> int:
        if self._take("{"):
            end = self._text.find("}", self._at)
            digits = self._text[self._at : end] if end > 0 else ""
            if not re.fullmatch("[0-9A-Fa-f]{1,6}", digits) or int(digits, 16) > 0x10FFFF:
                raise self._invalid("a \\u{ without a code point")
            self._at = end + 1
            return int(digits, 16)
        unit = self._hexadecimal(4)
        if 0xD800 <= unit < 0xDC00 and self._text.startswith("\\u", self._at):
            self._at += 2
            low = self._hexadecimal(4)
            if 0xDC00 <= low < 0xE000:
                return 0x10000 + ((unit - 0xD800) << 10) + low - 0xDC00
        if 0xD800 <= unit < 0xE000:
            raise self._unsupported("half of a surrogate pair")
        return unit

    def _hexadecimal(self, length: int) -> int:
        digits = self._text[self._at : self._at + length]
        if not re.fullmatch(f"[0-9A-Fa-f]{{{length}}}", digits):
            raise self._invalid(f"an escape without its {length} hexadecimal digits")
        self._at += length
        return int(digits, 16)

    def _peek(self) -> str:
        return self._text[self._at]

    def _next(self) -> str:
        self._at += 1
        return self._text[self._at - 1]

    def _take(self, expected: str) -> bool:
        found = self._text.startswith(expected, self._at)
        self._at += len(expected) * found
        return found

    def _invalid(self, why: str) -> InvalidConstraint:
        return InvalidConstraint(
            self._field, f"{self._text!r} is no pattern: {why} (at character {self._at})"
        )

    def _unsupported(self, what: str) -> UnsupportedConstraint:
        return UnsupportedConstraint(
            self._field,
            f"{self._text!r} has {what} (before character {self._at}), which no back-end honours "
            "in the way that every validator does",
        )


@cache
def _shorthand(letter: str) -> Ranges:
    """What every dialect counts to a shorthand class."""
    if letter == "d":
        return ASCII_DIGITS
    if letter == "w":
        return ASCII_WORD
    if letter == "s":
        return SPACES
    if letter == "D":
        return complement(digits_anywhere())
    if letter == "W":
        return complement(words_anywhere())
    return complement(SPACES_ANYWHERE)


@cache
def _written(members: Ranges) -> str:
    """A class as the shorter of its two ways to be written."""
    if not members:
        return "[^\\x00-\U0010ffff]"
    if len(members) == 1 and members[0][0] == members[0][1]:
        return _literal(chr(members[0][0]))
    others = complement(members)
    negated = 0 < len(others) < len(members)
    return f"[{'^' * negated}{''.join(map(_span, others if negated else members))}]"


def _span(span: tuple[int, int]) -> str:
    first, last = (_literal(chr(point)) for point in span)
    return first if first == last else f"{first}-{last}"


def _literal(character: str) -> str:
    if ord(character) < 0x20 or ord(character) == 0x7F:
        return f"\\x{ord(character):02x}"
    return f"\\{character}" if character in _META else character
