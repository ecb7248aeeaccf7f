"""The language of answers that may or must call functions, as a grammar.

The notation is Lark's with llguidance's ``%json`` (a schema as a rule), ``[suffix]`` (a rule ends
at the first occurrence of a text) and ``& ~`` (a pattern without another).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from anabranch.models.tools import CALL_CLOSE, CALL_OPEN

_FREE = "/(?s:.*)/"
# Templates write calls in this way, so it is what models have learnt.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def calls_grammar(
    functions: Sequence[tuple[str, dict[str, Any]]], *, text: bool, several: bool
) -> str:
    """Answers with calls of ``functions`` (name and schema of the arguments).

    With ``text`` the answer may also be text, or text and then calls. With ``several`` there may
    be more calls than one.
    """
    more = f" ({_quoted(f'{chr(10)}{CALL_OPEN}')} rest)*" if several else ""
    rules = []
    if text:
        rules += [
            f"start: FREE | opened rest{more}",
            f"FREE: {_FREE} & ~/(?s:.*){CALL_OPEN}(?s:.*)/",
            f"opened[suffix={_quoted(CALL_OPEN)}]: {_FREE}",
        ]
    else:
        rules.append(f"start: {_quoted(CALL_OPEN)} rest{more}")
    calls = " | ".join(f"call_{i}" for i in range(len(functions)))
    newline = _quoted("\n")
    rules.append(f"rest: {newline} ({calls}) {_quoted(f'{chr(10)}{CALL_CLOSE}')}")
    for i, (name, schema) in enumerate(functions):
        head = _quoted(f'{{"name": "{name}", "arguments": ')
        spaced = json.dumps({**schema, "x-guidance": _SPACING}, ensure_ascii=False)
        rules.append(f'call_{i}: {head} arguments_{i} "}}"')
        rules.append(f"arguments_{i}: %json {spaced}")
    return "\n".join(rules) + "\n"


def function_of_rule(name: str) -> int | None:
    """Which function's arguments a rule of the grammar describes, if it is such a rule."""
    match = re.fullmatch(r"arguments_([0-9]+)", name)
    return int(match[1]) if match else None


def _quoted(text: str) -> str:
    return json.dumps(text)
