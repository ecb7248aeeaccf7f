"""The messages that the troubleshooting page explains are those of the code."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
OWN = 0.2
"""The part of a message that its text in the code must spell out; the rest was filled in."""


def messages() -> list[str]:
    found = re.findall(r"```text\n(.*?)\n```", PAGE.read_text(), flags=re.DOTALL)
    assert all("\n" not in message for message in found)
    return found


@cache
def templates() -> list[tuple[re.Pattern[str], int]]:
    """Every text of the package as a pattern in which what is filled in may be anything, and how
    many letters it spells out.
    """
    found = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(p.value) if isinstance(p, ast.Constant) else None for p in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = [node.value.strip()]
            else:
                continue
            pattern = "".join(".*" if part is None else re.escape(part) for part in parts)
            spelled = sum(len(part) for part in parts if part is not None)
            found.append((re.compile(pattern, flags=re.DOTALL), spelled))
    return found


def said_by_the_code(message: str) -> bool:
    # Errors of a request or a recipe come behind the name of the field.
    candidates = [message, message.partition(": ")[2]]
    return message in (ROOT / "Makefile").read_text() or any(
        spelled >= OWN * len(text) and pattern.fullmatch(text)
        for text in candidates
        for pattern, spelled in templates()
        if text
    )


@pytest.mark.parametrize("message", messages(), ids=lambda m: m[:40])
def test_the_code_says_what_the_page_explains(message):
    assert said_by_the_code(message)


def test_a_message_that_nobody_says_is_found():
    assert not said_by_the_code(
        "there is no such thing as a free lunch, whatever its template says; pay 3 euros"
    )
    assert not said_by_the_code("temprature: this field is unknown to us")
