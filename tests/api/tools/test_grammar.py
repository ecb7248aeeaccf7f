"""The grammar of calls against the library whose notation it is in, byte by byte."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.api.tools.grammar import calls_grammar
from anabranch.api.tools.reader import CallReader, whole

from .functions import CITY, call_text

llguidance = pytest.importorskip("llguidance", reason="llguidance is not installed")

TREE = {
    "type": "object",
    "properties": {"tree": {"$ref": "#/$defs/tree"}},
    "required": ["tree"],
    "additionalProperties": False,
    "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
}
FUNCTIONS = [("weather", CITY), ("plant", TREE), ("any-1", {"type": "object"})]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return llguidance.LLTokenizer("byte")


def verdict(tokenizer: Any, answer: str, **options: bool) -> str:
    matcher = llguidance.LLMatcher(tokenizer, calls_grammar(FUNCTIONS, **options), log_level=0)
    assert not matcher.get_error(), matcher.get_error()
    for byte in answer.encode():
        if not matcher.consume_token(byte):
            return "refused"
    return "complete" if matcher.is_accepting() else "begun"


BERN = call_text("weather", {"city": "Bern"})
TWO = f"{BERN}\n{call_text('plant', {'tree': [[], [[]]]})}"
PLAIN = "a < b, <tool, {\u2028é🙂"


@pytest.mark.parametrize(
    ("text", "auto", "required", "one"),
    [
        ("", "complete", "begun", "complete"),
        (PLAIN, "complete", "refused", "complete"),
        (BERN, "complete", "complete", "complete"),
        (TWO, "complete", "complete", "refused"),
        (f"{PLAIN}\n\n{BERN}", "complete", "refused", "complete"),
        (f"{PLAIN}{TWO}", "complete", "refused", "refused"),
        (call_text("any-1", {"a": [1.5, None]}), "complete", "complete", "complete"),
        (call_text("weather", {"city": "</tool_call>"}), "complete", "complete", "complete"),
        (BERN[:-1], "begun", "begun", "begun"),
        (f"{BERN} and more", "refused", "refused", "refused"),
        (call_text("weather", {"town": "Bern"}), "refused", "refused", "refused"),
        (call_text("weather", {}), "refused", "refused", "refused"),
        (call_text("plant", {"tree": [1]}), "refused", "refused", "refused"),
        (call_text("other", {}), "refused", "refused", "refused"),
        ("<tool_call>{", "refused", "refused", "refused"),
        ("hm <tool_call> hm", "refused", "refused", "refused"),
    ],
)
def test_what_may_be_answered(
    tokenizer: Any, text: str, auto: str, required: str, one: str
) -> None:
    assert verdict(tokenizer, text, text=True, several=True) == auto
    assert verdict(tokenizer, text, text=False, several=True) == required
    assert verdict(tokenizer, text, text=True, several=False) == one


# The library wants DEL escaped, which JSON does not.
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\x7f")
cities = st.fixed_dictionaries({"city": st.text(characters)})
calls = st.tuples(st.just("weather"), cities)
texts = st.text("<tol_ca>l\n é", max_size=30).filter(lambda text: "<tool_call>" not in text)


@settings(deadline=None)
@given(texts, st.lists(calls, max_size=3))
def test_what_is_allowed_is_read_back(
    tokenizer: Any, text: str, asked: list[tuple[str, dict[str, Any]]]
) -> None:
    answer = text + "\n".join(call_text(*call) for call in asked)
    assert verdict(tokenizer, answer, text=True, several=True) == "complete"
    content, read = whole(CallReader({name for name, _ in FUNCTIONS}), answer)
    assert [json.loads(call["function"]["arguments"]) for call in read] == [a for _, a in asked]
    assert (content or "") == (text.rstrip() if asked else text)
