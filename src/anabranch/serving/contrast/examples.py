"""Which lines of a description are examples: doctests, asserts, arrow lines, "Example:" parts.

Knows prose only, one line an entry and without comment marks. What is not clearly an example stays:
``(int, int) -> [int]`` is a type and ``f(x) = f(x - 1)`` a definition, because an example has a
literal on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LONGEST_LINE, FARTHEST = 2000, 40
"""Characters of a line and lines after it that are looked at: prompts come from anyone, and no text
may take more than a moment. Longer lines are never examples, longer asserts end there."""

Kept = list[str | None]
"""What stays of each line; None where the line goes."""

_LITERAL = re.compile(
    r"""(?<![\w.])[-+]?\d|["'`“”]|\b(?:True|False|None|null|undefined|true|false)\b"""
    r"""|\[\s*\]|\(\s*\)|\{\s*\}|\bError\b"""
)
_VALUE = re.compile(r"""[-+]?\d|["'`“\[({]|(?:True|False|None|null|undefined|true|false|Error)\b""")
_BULLET = r"(?:[-*•]\s+|\d+[.)]\s+)?(?:(?:for|if)\s+)?"
_ARROW = r"(?:=+>|-+>|→|➞|⇒|↦)"
_SAYS = rf"(?:{_ARROW}|={{1,3}}|(?:(?:should|would|will|must) )?(?:returns?|equals?|gives|be)\b)"
_CALL = re.compile(rf"^{_BULLET}(?P<name>[\w.]+)\s?(\(.*\))\s*({_SAYS})\s*(.+)$", re.IGNORECASE)
_PAIR = re.compile(rf"^{_BULLET}((?:\w+\s*=\s*)?(?:[-+]?\d|[\"'`“\[({{]).*?)\s*({_ARROW})\s*(.+)$")
_ASSERT = re.compile(
    r"^(?:(?:self|console|chai)\.)?assert\w*(?:\.\w+)?\(|^Assert\.\w+\(|"
    r"^assert\s.*(?:[=!<>]=|[<>]|\w\(|[\[({]\s*$)"
)
_LABELLED = re.compile(
    r"^(?:sample\s+)?(?:input|output|explanation|result)s?\b[^:]{0,12}:\s*\S", re.I
)

_HEADER = re.compile(
    r"^(?:@example\b|(?:for\s+)?examples?(?:\s+usage|\s+cases?)?\s*#?\d*\s*(?:\(s\))?\s*:|"
    r"(?:for\s+)?examples?\s*\d*\s*$|(?:sample|unit|example)?\s*tests?(?:\s+cases?)?\s*:\s*$|"
    r"[\w/\[\] ]{0,20}\bsamples?\s*:\s*$|"
    r"(?:your|the)\s+(?:code|function|solution)\s+(?:should|must)\s+(?:pass|satisfy)\s+"
    r"(?:these|the following|this)\s+(?:tests?|assertions?)(?:\s+cases?)?\s*:?\s*$)",
    re.IGNORECASE,
)
_SENTENCE = re.compile(
    r"(?:^|(?<=[.!?:;])[ \t]+)(?:for example|for instance|e\.g\.|example[:,])", re.I
)
_SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z]|\s*\Z)")
_SECTION = re.compile(
    r"^(?:@(?!example)\w+|:\w+|(?:args?|arguments|param(?:eter)?s?|returns?|raises|throws|yields|"
    r"notes?|constraints?|restrictions?|variables|attributes|hints?|warnings?|assumptions?|"
    r"requirements?)\b[^:]{0,20}:|note\b|[A-Z][\w ]{0,30}:\s*$)",
    re.IGNORECASE,
)
_UNDERLINE = re.compile(r"^\s*[-=~]{3,}\s*$")


def without_examples(lines: Sequence[str]) -> Kept:
    """What stays of each line of a description.

    A headed part (``Examples:``, ``@example``) ends at the next section, or after a paragraph that
    is followed by one which is neither indented more nor looks like an example. A sentence ("For
    example, ...") ends with itself.
    """
    kept: Kept = list(lines)
    defined = {name for line in lines if (name := _defined(line))}
    at = 0
    while at < len(lines):
        line = lines[at].strip()
        if _is_header(lines, at):
            end = _end_of_part(lines, at)
        elif line.startswith(">>>"):
            end = _end_of_doctest(lines, at)
        elif _ASSERT.match(line):
            end = end_of_statement(lines, at)
        elif is_example(line) and not ((call := _CALL.match(line)) and call["name"] in defined):
            end = at + 1
        else:
            at = _cut_sentence(lines, kept, at)
            continue
        kept[at:end] = [None] * (end - at)
        at = end
    return kept


def is_example(line: str) -> bool:
    """Whether a line is ``f("ab") == "ba"``, ``[1, 2] -> 3`` or the like."""
    line = line.strip()
    if len(line) > LONGEST_LINE:
        return False
    if found := _CALL.match(line):
        _, left, says, right = found.groups()
        if left.replace(" ", "") != "()" and not _LITERAL.search(left[1:-1]):
            return False
    elif found := _PAIR.match(line):
        left, says, right = found.groups()
        if not _LITERAL.search(left):
            return False
    else:
        return False
    if says == "->" and re.match(r"None\b", right):
        return False  # the type of what is returned
    return bool(_VALUE.match(right) and _LITERAL.search(right))


def _defined(line: str) -> str | None:
    """``f`` for ``f(n) = f(n - 1) + 1``: then ``f(0) = 1`` is its base case, not an example."""
    found = _CALL.match(line.strip()) if len(line) <= LONGEST_LINE else None
    if not found or is_example(line):
        return None
    return found["name"] if re.search(rf"\b{re.escape(found['name'])} ?\(", found[4]) else None


def is_assert(line: str) -> bool:
    """Whether a line starts an assertion in one of the usual test libraries."""
    return bool(_ASSERT.match(line))


def announces_examples(line: str) -> bool:
    """Whether a line is a header of examples with nothing else on it."""
    return bool((found := _HEADER.match(line.strip())) and not line.strip()[found.end() :].strip())


def end_of_statement(lines: Sequence[str], at: int) -> int:
    """The line after a statement that may go on over several lines until its brackets close."""
    depth = 0
    for end in range(at, min(len(lines), at + FARTHEST)):
        code = re.sub(r"\"[^\"]*\"|'[^']*'", "", lines[end])
        depth += sum(map(code.count, "([{")) - sum(map(code.count, ")]}"))
        if depth <= 0:
            return end + 1
        if not lines[end].strip():
            break  # brackets that never close: do not take the rest of the text
    return at + 1


def _is_header(lines: Sequence[str], at: int) -> bool:
    found = _HEADER.match(lines[at].strip())
    if not found:
        return False
    rest = lines[at].strip()[found.end() :].strip()
    return not rest or found[0].startswith("@") or is_example(rest)


def _end_of_part(lines: Sequence[str], start: int) -> int:
    indent = _indent(lines[start])
    tagged = lines[start].strip().startswith("@")
    end = at = start + 1
    while at < len(lines):
        line = lines[at].strip()
        fresh = not lines[at - 1].strip()
        deeper = _indent(lines[at]) > indent
        if line:
            if not deeper and (_is_section(lines, at) or _is_header(lines, at)):
                break
            if at > start + 1 and not (tagged or deeper) and _resumes_description(line):
                break
            if fresh and at > start + 1 and not (tagged or deeper or _looks_like_example(line)):
                break
            end = at + 1
        at += 1
    return end


def _resumes_description(line: str) -> bool:
    """A sentence without any literal, right below an example."""
    return bool(re.match(r"[A-Z][a-z]* ", line)) and not (
        _LITERAL.search(line) or _looks_like_example(line)
    )


def _looks_like_example(line: str) -> bool:
    return (
        line.startswith(">>>")
        or bool(_ASSERT.match(line) or _LABELLED.match(line))
        or is_example(line)
    )


def _end_of_doctest(lines: Sequence[str], at: int) -> int:
    """Statement, continuation lines and output: up to a blank line, prompt or section."""
    at += 1
    while at < len(lines) and (line := lines[at].strip()):
        if line.startswith(">>>") or _is_section(lines, at) or _is_header(lines, at):
            break
        at += 1
    return at


def _is_section(lines: Sequence[str], at: int) -> bool:
    underlined = at + 1 < len(lines) and _UNDERLINE.match(lines[at + 1])
    return bool(_SECTION.match(lines[at].strip()) or underlined)


def _cut_sentence(lines: Sequence[str], kept: Kept, at: int) -> int:
    """Take an example sentence that starts on this line out; the next line to look at."""
    line = lines[at]
    found = _SENTENCE.search(line.lstrip()) if len(line) <= LONGEST_LINE else None
    if not found or not _begins_sentence(lines, at, found):
        return at + 1
    start = len(line) - len(line.lstrip()) + found.start()
    end = at + 1
    limit = min(len(lines), at + FARTHEST)
    while end < limit and lines[end].strip() and not _is_section(lines, end):
        if _looks_like_example(lines[end].strip()) or _is_header(lines, end):
            break
        end += 1
    text = "\n".join([line[start:], *lines[at + 1 : end]])
    stop = _SENTENCE_END.search(text, found.end() - found.start())
    rest = text[stop.end() :] if stop else ""
    whole = len(text[: stop.end()].split("\n")) if stop else end - at  # lines it reaches into
    last = at + whole - 1
    kept[at:last] = [None] * (last - at)
    tail = rest.split("\n")[0].lstrip()
    if last == at:
        kept[at] = line[:start] + (rest.split("\n")[0] if line[:start].strip() else tail) or None
    else:
        kept[at] = line[:start] or None
        kept[last] = lines[last][: _indent(lines[last])] + tail
    for changed in {at, last}:
        if not (kept[changed] or "").strip():
            kept[changed] = None
    return last + 1


def _begins_sentence(lines: Sequence[str], at: int, found: re.Match[str]) -> bool:
    """Not so for the words within a sentence that was wrapped before them."""
    if found.start() > 0 or not found[0][0].islower():
        return True
    before = lines[at - 1].rstrip() if at else ""
    return not before or before[-1] in ".!?:;"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
