"""How functions are offered to a model and called by it: one convention for all chat templates.

It is that of Hermes 2 Pro (Nous Research 2024), which Qwen's and many other templates share. A
call is text of the answer::

    <tool_call>
    {"name": "weather", "arguments": {"city": "Bern"}}
    </tool_call>

A template that writes calls in this way tells the model of the functions itself. For any other
template the functions are described in a system message (or in the user's first one, if the
template has no place for a system's), earlier calls are spelled out in the assistant's turns, and
results are given in the user's.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Tool = Mapping[str, Any]
"""``{"type": "function", "function": {"name", "description", "parameters"}}``, as templates take
it; ``parameters`` is a JSON schema."""

CALL_OPEN = "<tool_call>"
CALL_CLOSE = "</tool_call>"


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> str:
    """The prompt of a conversation, up to where the answer begins.

    Assistants' turns may have ``tool_calls``, whose ``arguments`` are an object (or text, if the
    model wrote no JSON), and ``tool`` turns answer them. Raises whatever the template raises.
    """
    has_calls = any(m["role"] == "tool" or m.get("tool_calls") for m in messages)
    if not (tools or has_calls):
        return _apply(tokenizer, messages, ())
    if writes_calls(tokenizer):
        # Some templates know tools, but not every schema of their arguments.
        with contextlib.suppress(Exception):
            return _apply(tokenizer, messages, tools)
    role = "system" if _has_system(tokenizer) else "user"
    return _apply(tokenizer, spelled_out(messages, tools, role), ())


def writes_calls(tokenizer: Any) -> bool:
    """Whether the chat template knows tools and writes calls in the convention above."""
    called = {"name": "probe_call", "arguments": {"number": 1}}
    call = {"type": "function", "function": called}
    schema = {"type": "object", "properties": {"number": {"type": "integer"}}}
    offered = {"name": "probe_offer", "description": "", "parameters": schema}
    try:
        text = _apply(
            tokenizer,
            [
                {"role": "user", "content": "probe_question"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "probe_result", "name": "probe_call"},
            ],
            [{"type": "function", "function": offered}],
        )
    except Exception:  # templates raise whatever their author chose
        return False
    blocks = re.findall(f"{CALL_OPEN}(.*?){CALL_CLOSE}", text, re.DOTALL)
    written = any(_decoded(block) == called for block in blocks)
    return written and "probe_offer" in text and "probe_result" in text


def spelled_out(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], role: str = "system"
) -> list[dict[str, Any]]:
    """The same conversation in turns of plain text.

    The functions are described in the first message, which is one of this role.
    """
    turns: list[dict[str, Any]] = []
    results: dict[str, Any] | None = None  # the turn that the next result belongs to
    for message in messages:
        content = message["content"]
        if message["role"] == "tool":
            result = f"<tool_response>\n{content}\n</tool_response>"
            # Results of one turn's calls are one turn: many templates want turns to alternate.
            if results is not None:
                results["content"] += f"\n{result}"
                continue
            results = {"role": "user", "content": result}
            turns.append(results)
            continue
        results = None
        calls = [_spelled_call(call["function"]) for call in message.get("tool_calls", ())]
        spelled = "\n".join([content, *calls] if content else calls)
        kept = {key: value for key, value in message.items() if key != "tool_calls"}
        turns.append({**kept, "content": spelled})
    if tools:
        described = describe(tools)
        if turns[0]["role"] != role:
            turns.insert(0, {"role": role, "content": described})
        elif role == "system":
            turns[0]["content"] += f"\n\n{described}"
        else:
            turns[0]["content"] = f"{described}\n\n{turns[0]['content']}"
    return turns


def describe(tools: Sequence[Tool]) -> str:
    """What a model is told about functions and how to call them."""
    listing = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "These functions can be called, each described by a line of JSON:\n"
        f"<tools>\n{listing}\n</tools>\n"
        "To call one, answer with its name and arguments as JSON between these tags, and with "
        "one pair of tags for each call:\n"
        f'{CALL_OPEN}\n{{"name": "<function>", "arguments": {{"<argument>": "<value>"}}}}\n'
        f"{CALL_CLOSE}"
    )


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _has_system(tokenizer: Any) -> bool:
    turns = [
        {"role": "system", "content": "probe_rules"},
        {"role": "user", "content": "probe_question"},
    ]
    try:
        return "probe_rules" in _apply(tokenizer, turns, ())
    except Exception:  # templates raise whatever their author chose
        return False


def _spelled_call(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"{CALL_OPEN}\n{json.dumps(call, ensure_ascii=False)}\n{CALL_CLOSE}"


def _apply(tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> str:
    rendered: str = tokenizer.apply_chat_template(
        list(messages),
        tools=[dict(tool) for tool in tools] or None,
        add_generation_prompt=True,
        tokenize=False,
    )
    return rendered
