"""The prompt without its examples, by which contrast learns what the model says out of habit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from anabranch.errors import InvalidRequest, did_you_mean
from anabranch.serving.contrast.examples import (
    Kept,
    announces_examples,
    end_of_statement,
    is_assert,
    without_examples,
)


@dataclass(frozen=True)
class _Syntax:
    """Where descriptions stand in a language.

    ``token`` finds strings and comments from left to right, so that neither hides in the other;
    its groups ``open``, ``inner`` are a block that may hold a description. ``mark`` starts a
    comment to the end of the line.
    """

    token: re.Pattern[str]
    mark: str
    decoration: str
    """What precedes the text of a line within a block."""


_STRING = r""""(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'"""
_PYTHON = _Syntax(
    re.compile(
        rf"""(?P<open>[rRuU]?(?P<quote>\"\"\"|'''))(?P<inner>.*?)(?:(?P=quote)|\Z)|\#[^\n]*|{_STRING}""",
        re.DOTALL,
    ),
    mark="#",
    decoration=r"[ \t]*",
)
_C_LIKE = _Syntax(
    re.compile(
        rf"(?P<open>/\*+)(?P<inner>.*?)(?:\*/|\Z)|//[^\n]*|`(?:\\.|[^`\\])*`|{_STRING}", re.DOTALL
    ),
    mark="//",
    decoration=r"[ \t]*\*?(?!/)",
)
LANGUAGES = {
    "python": _PYTHON,
    **dict.fromkeys(
        ("c", "cpp", "csharp", "go", "java", "javascript", "rust", "typescript"), _C_LIKE
    ),
}

_CODE = re.compile(
    r"^[ \t]*(?:(?:async +)?def +\w+ *\(|class +\w+ *[:({]|from +\S+ +import\b|import +[\w{*]"
    r"|(?:export +)?(?:default +)?(?:async +)?function\b"
    r"|(?:public|private|protected|static|package|using) |(?:const|let|var) +\w+|#include\b"
    r"|fn +\w+|func +\w+|@\w+)",
    re.MULTILINE,
)
_ASKS = re.compile(
    r"^[ \t]*(?:### *)?(?:q|question|input|problem|task|instruction|user)\s*\d*\s*:", re.I
)
_ANSWERS = re.compile(
    r"^[ \t]*(?:### *)?(?:a|answer|output|solution|response|assistant|program|code)\s*\d*\s*:",
    re.IGNORECASE,
)


def lame_prompt(text: str, language: str = "python") -> str | None:
    """``text`` without its input-output examples; None where it has none.

    Taken out of docstrings and comments: doctests with their output, ``Example:`` parts, "For
    example" sentences, asserts, and lines such as ``f("ab") -> "ba"``. Asserts at the start of a
    line outside comments go too, with the line that announces them. A text without code is read as
    a description as a whole, and answered questions before the last one (few-shot demonstrations)
    are taken out. Signatures, types and descriptions stay to the letter.

    ``language``: see :data:`LANGUAGES`; :class:`InvalidRequest` for others. Known limits: prose
    right below an example in a headed part goes with it, unless it starts a sentence without any
    literal; an example without a literal (``ab becomes ba``) and without a header stays.

    Source: USCD, section 3.1 (there: a prompt whose examples were removed by hand).
    """
    syntax = LANGUAGES.get(language.lower())
    if syntax is None:
        raise InvalidRequest(
            "contrast.language",
            f"no language {language!r}{did_you_mean(language, LANGUAGES)}; "
            f"known: {', '.join(LANGUAGES)}",
        )
    before, after = None, text
    while after != before:  # what one pass lays bare goes in the next, so that the result is final
        before, after = after, _pass(after, syntax)
    return None if after == text else after


def _pass(text: str, syntax: _Syntax) -> str:
    blocks = [m for m in syntax.token.finditer(text) if _is_description(text, m)]
    for block in reversed(blocks):
        inner = _clean_block(block["inner"], syntax)
        text = text[: block.start("inner")] + inner + text[block.end("inner") :]
    lines = text.split("\n")
    covered = _lines_within(text, syntax)
    commented = _clean_comments(lines, covered, syntax)
    prose = not blocks and not commented.found and not _CODE.search(text)
    kept = _clean_prose(lines) if prose else commented.kept
    _drop_asserts(lines, covered, kept)
    return "\n".join(_joined(lines, kept))


def _is_description(text: str, found: re.Match[str]) -> bool:
    """A block alone on its line: a string that something is done with is data."""
    if found.lastgroup is None or found["open"] is None:
        return False
    return not text[text.rfind("\n", 0, found.start()) + 1 : found.start()].strip()


def _lines_within(text: str, syntax: _Syntax) -> set[int]:
    """Numbers of the lines that start inside a string or block comment."""
    within: set[int] = set()
    line = before = 0
    for found in syntax.token.finditer(text):
        line += text.count("\n", before, found.start())
        before = found.start()
        within.update(range(line + 1, line + 1 + found[0].count("\n")))
    return within


def _clean_block(inner: str, syntax: _Syntax) -> str:
    lines = inner.split("\n")
    starts = [0, *(_match_end(syntax.decoration, line) for line in lines[1:])]
    # Indentation counts within a description; decoration becomes blanks of the same width.
    content = [" " * start + line[start:] for start, line in zip(starts, lines, strict=True)]
    kept: Kept = [
        None if new is None else (line if new == old else line[:start] + new[start:])
        for line, start, old, new in zip(
            lines, starts, content, without_examples(content), strict=True
        )
    ]
    # The quotes stand on the first and the last line, which can therefore only become empty.
    if kept[0] is None:
        kept[0] = ""
    if kept[-1] is None:
        kept[-1] = lines[-1][: starts[-1]]
    return "\n".join(_joined(content, kept))


@dataclass
class _Commented:
    kept: Kept
    found: bool


def _clean_comments(lines: Sequence[str], covered: set[int], syntax: _Syntax) -> _Commented:
    """Runs of lines that are comments as a whole."""
    kept: Kept = list(lines)
    mark = rf"\s*{re.escape(syntax.mark)}+"
    at, seen = 0, False
    while at < len(lines):
        end = at
        while end < len(lines) and end not in covered and re.match(mark, lines[end]):
            end += 1
        starts = [_match_end(mark, line) for line in lines[at:end]]
        content = [line[start:] for line, start in zip(lines[at:end], starts, strict=True)]
        for offset, new in enumerate(_blank_lines_dropped(content, without_examples(content))):
            old = lines[at + offset]
            kept[at + offset] = None if new is None else old[: starts[offset]] + new
        seen = seen or end > at
        at = end + 1
    return _Commented(kept, seen)


def _clean_prose(lines: Sequence[str]) -> Kept:
    kept = without_examples(lines)
    questions = [i for i, line in enumerate(lines) if _ASKS.match(line)]
    for start, end in pairwise(questions):
        if any(_answer(lines, at, end) for at in range(start + 1, end)):
            kept[start:end] = [None] * (end - start)
    return kept


def _answer(lines: Sequence[str], at: int, end: int) -> bool:
    found = _ANSWERS.match(lines[at])
    if not found:
        return False
    return bool("".join([lines[at][found.end() :], *lines[at + 1 : end]]).strip())


def _drop_asserts(lines: Sequence[str], covered: set[int], kept: Kept) -> None:
    """Asserts at the very start of a line: indented ones belong to the code."""
    for at, line in enumerate(lines):
        if at in covered or kept[at] is None or not is_assert(line):
            continue
        end = end_of_statement(lines, at)
        kept[at:end] = [None] * (end - at)
        header = at - 1
        while header >= 0 and not (kept[header] or "").strip():
            header -= 1
        if header >= 0 and header not in covered and announces_examples(lines[header]):
            kept[header] = None


def _joined(lines: Sequence[str], kept: Kept) -> list[str]:
    return [line for line in _blank_lines_dropped(lines, kept) if line is not None]


def _blank_lines_dropped(lines: Sequence[str], kept: Kept) -> Kept:
    """Of the blank lines around what was taken out, those before it go if some follow.

    ``lines`` are without comment marks.
    """
    result = list(kept)

    def blank(at: int) -> bool:
        line = result[at]
        return line is not None and not (lines[at].strip() and line.strip())

    at = 0
    while at < len(result):
        if result[at] is not None:
            at += 1
            continue
        end = at
        while end < len(result) and result[end] is None:
            end += 1
        if end == len(result) or blank(end):
            before = at - 1
            # The first line of a block is where its quotes stand.
            while before > 0 and blank(before):
                result[before] = None
                before -= 1
        at = end
    return result


def _match_end(pattern: str, line: str) -> int:
    found = re.match(pattern, line)
    return found.end() if found else 0
