"""Functions in prompts: by the template itself where it knows how, spelled out where not."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from anabranch.models.tools import describe, render, spelled_out, writes_calls
from tests import tiny

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
ANSWER = "{% if add_generation_prompt %}<assistant>{% endif %}"
PLAIN = TURNS + ANSWER
KNOWS_TOOLS = (
    "{% if tools %}[can:{% for tool in tools %}{{ tool | tojson }}{% endfor %}]{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}</{{ m.role }}>{% endfor %}" + ANSWER
)
OTHER_FORM = KNOWS_TOOLS.replace("tool_call>", "function>")
ARGUMENTS_FIRST = KNOWS_TOOLS.replace(
    '"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}',
    '"arguments": {{ call.function.arguments | tojson }}, "name": "{{ call.function.name }}"',
)
PICKY = "{% if tools and tools[0].function.name == 'weather' %}{{ tools.x + 1 }}{% endif %}"
FORGETS_RESULTS = KNOWS_TOOLS.replace("{{ m.content }}", "{% if m.role != 'tool' %}x{% endif %}")

TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "é", "parameters": {"type": "object"}},
}
USER = {"role": "user", "content": "q"}
CALL = {"name": "weather", "arguments": {"city": "Zürich"}}
SPELLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
CALLS = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "a", "type": "function", "function": CALL}],
}
RESULT = {"role": "tool", "content": "rain", "name": "weather", "tool_call_id": "a"}


def tokenizer(template: str) -> Any:
    made = copy.deepcopy(tiny.byte_tokenizer())
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (KNOWS_TOOLS, True),
        (ARGUMENTS_FIRST, True),
        (PLAIN, False),
        (OTHER_FORM, False),
        (FORGETS_RESULTS, False),
        ("{{ raise_exception('users only') }}", False),
    ],
)
def test_which_templates_write_calls(template: str, wanted: bool) -> None:
    assert writes_calls(tokenizer(template)) is wanted


def test_a_template_that_knows_tools_is_left_to_itself() -> None:
    text = render(tokenizer(KNOWS_TOOLS), [USER, CALLS, RESULT], [TOOL])
    assert text == (
        f"[can:{json.dumps(TOOL, ensure_ascii=False)}]<user>q</user>"
        f"<assistant>{SPELLED}</assistant><tool>rain</tool><assistant>"
    )


@pytest.mark.parametrize("template", [PLAIN, OTHER_FORM, PICKY + KNOWS_TOOLS])
def test_for_any_other_they_are_spelled_out(template: str) -> None:
    text = render(tokenizer(template), [USER, CALLS, RESULT, RESULT], [TOOL])
    result = "<tool_response>\nrain\n</tool_response>"
    assert text == (
        f"<system>{describe([TOOL])}</system><user>q</user><assistant>{SPELLED}</assistant>"
        f"<user>{result}\n{result}</user><assistant>"
    )


@pytest.mark.parametrize("template", [PLAIN, KNOWS_TOOLS])
def test_without_tools_nothing_is_said_of_them(template: str) -> None:
    assert render(tokenizer(template), [USER], []) == "<user>q</user><assistant>"


def test_calls_without_tools_are_still_spelled_out() -> None:
    text = render(tokenizer(PLAIN), [USER, CALLS, RESULT], [])
    assert "<tools>" not in text
    assert f"<assistant>{SPELLED}</assistant><user><tool_response>" in text


def test_a_system_message_is_extended_and_names_are_kept() -> None:
    turns = spelled_out(
        [{"role": "system", "content": "be brief"}, {**USER, "name": "ann"}], [TOOL]
    )
    assert turns == [
        {"role": "system", "content": f"be brief\n\n{describe([TOOL])}"},
        {"role": "user", "content": "q", "name": "ann"},
    ]


def test_a_template_without_a_system_role_has_them_in_the_users_first_message() -> None:
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    text = render(tokenizer(no_system + PLAIN), [USER, CALLS, RESULT], [TOOL])
    assert text.startswith(f"<user>{describe([TOOL])}\n\nq</user><assistant>{SPELLED}</assistant>")
    greeting = {"role": "assistant", "content": "hello"}
    text = render(tokenizer(no_system + PLAIN), [greeting, USER], [TOOL])
    assert text.startswith(f"<user>{describe([TOOL])}</user><assistant>hello</assistant><user>q")


def test_what_was_said_besides_calls_and_arguments_that_are_no_object() -> None:
    odd = {"id": "b", "type": "function", "function": {"name": "f", "arguments": '{"cut": '}}
    turn = {**CALLS, "content": "Hm.", "tool_calls": [*CALLS["tool_calls"], odd]}
    (spelled,) = spelled_out([turn], [])
    assert spelled == {
        "role": "assistant",
        "content": f"Hm.\n{SPELLED}\n<tool_call>\n"
        '{"name": "f", "arguments": "{\\"cut\\": "}\n</tool_call>',
    }


def test_nothing_given_is_changed() -> None:
    messages = [{"role": "system", "content": "s"}, USER, CALLS, RESULT, RESULT]
    before = copy.deepcopy(messages)
    spelled_out(messages, [TOOL])
    assert messages == before


def test_the_description_shows_the_schemas_and_the_form() -> None:
    text = describe([TOOL, TOOL])
    listed = text.partition("<tools>\n")[2].partition("\n</tools>")[0].splitlines()
    assert [json.loads(line) for line in listed] == [TOOL, TOOL]
    assert '<tool_call>\n{"name": ' in text
