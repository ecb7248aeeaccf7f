"""Rows become texts, answers become predictions; whatever is generated can be read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch import registry
from anabranch.training.data.generators import GENERATORS, generate
from anabranch.training.errors import DataError
from anabranch.training.task import Task
from anabranch.training.tasks.arithmetic import Arithmetic, chosen_letter, last_number
from anabranch.training.tasks.chat import Chat, token_f1
from anabranch.training.tasks.preference import Preference
from anabranch.training.tasks.text import Text

PLAIN = ("chat", "text", "arithmetic", "preference")
TASKS: dict[str, Task] = {name: registry.get("tasks", name)() for name in PLAIN}


@pytest.mark.parametrize("name", PLAIN)
@given(st.text(), st.sampled_from([1.5, "A", "some text"]))
def test_parsers_are_total(name: str, text: str, reference: float | str) -> None:
    task = TASKS[name]
    if name != "arithmetic" and not isinstance(reference, str):
        reference = str(reference)
    assert task.correct(task.parse(text), reference) in (True, False)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 1,234.50.", 1234.5),
        ("3 + 4 = 7 apples, so -7", -7.0),
        ("5-2", -2.0),  # as published: the sign belongs to the number
        ("none", None),
        ("", None),
        ("9" * 400, None),  # more than a float holds
        ("x = \u0665", None),  # digits of other scripts are not read
    ],
)
def test_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (D).", "D"),
        ("A: it cannot be E, so the answer is b", "B"),
        ("Because of C", "C"),
        ("Because", None),
    ],
)
def test_chosen_letter(text: str, letter: str | None) -> None:
    assert chosen_letter(text) == letter


@given(st.floats(-1e6, 1e6), st.floats(0, 0.0009))
def test_numbers_within_a_thousandth_are_right(number: float, error: float) -> None:
    task = Arithmetic()
    reference = task.reference({"question": "?", "answer": f"#### {number:.4f}"})
    near = task.parse(f"so it is {float(f'{number:.4f}') + error:.6f}")
    assert task.correct(near, reference)
    assert not task.correct(task.parse("so it is"), reference)
    assert not task.correct(task.parse(f"{number + 1:.4f}"), reference)


def test_gsm8k_rows() -> None:
    row = {"question": "Q", "answer": "He has 48/2 = <<48/2=24>>24 left.\n#### 1,024"}
    task = Arithmetic()
    assert task.render(row)[0].answer == "He has 48/2 = 24 left.\nThe answer is 1,024."
    assert task.reference(row) == 1024


def test_llm_adapters_rows() -> None:
    row = {"instruction": "Q", "input": "", "output": "so (B). The answer is 5.", "answer": "4.0"}
    task = Arithmetic()
    assert task.reference(row) == 4
    assert task.reference({**row, "answer": "A"}) == "A"
    assert not task.correct(task.parse(row["output"]), 4.0)
    with pytest.raises(DataError, match=r"does not end with the result 4\.0"):
        Arithmetic(consistent=True).render(row)
    with pytest.raises(DataError, match="neither a number nor"):
        task.reference({**row, "answer": "many"})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q", "answer": "a"},
        {"prompt": "q", "response": "a"},
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"input": "q", "output": "a"},
        {"question": "q", "answer": "a"},
        {"query": "q", "answer": "a"},
    ],
)
def test_accepted_shapes_mean_the_same(row: dict[str, object]) -> None:
    (rendered,) = Chat().render(row)
    assert [(m["role"], m["content"]) for m in rendered.messages] == [
        ("user", "q"),
        ("assistant", "a"),
    ]


def test_system_input_and_tools() -> None:
    row = {"system": "s", "instruction": "i", "input": "x", "output": "o"}
    assert [m["content"] for m in Chat().render(row)[0].messages] == ["s", "i\n\nx", "o"]
    tools = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": "f()"},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "a"},
        ]
    }
    roles = [m["role"] for m in Chat().render(tools)[0].messages]
    assert roles == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"Question": "q", "answer": "a"}, "accepts messages.*map: {messages"),
        ({}, r"\(none\)"),
        ({"messages": [{"role": "user", "content": "q"}]}, "must be the assistant's"),
        ({"messages": []}, "does not exist"),
        ({"messages": [{"role": "boss", "content": "q"}]}, "role 'boss'"),
        ({"messages": [{"role": "user"}]}, "needs text"),
        ({"messages": "hello"}, "list of turns"),
        ({"messages": [3]}, r"messages\[0\] must be an object"),
        ({"prompt": ["x"], "answer": "a"}, "column 'prompt' must be text"),
    ],
)
def test_bad_rows_say_what_is_wrong(row: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Chat().render(row)


def test_preference_pairs() -> None:
    chosen, rejected = Preference().render(
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        }
    )
    assert (chosen.prompt, chosen.answer, rejected.answer) == (rejected.prompt, "good", "bad")
    whole = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}]
    other = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "bad"}]
    with pytest.raises(DataError, match="different conversations"):
        Preference().render({"chosen": whole, "rejected": other})
    with pytest.raises(DataError, match="are the same"):
        Preference().render({"prompt": "q", "chosen": "x", "rejected": "x"})


def test_scores() -> None:
    assert Chat().score([], []) == {}
    assert Chat().score(["a b", "c"], ["a b", "d"]) == {"token_f1": 0.5, "exact": 0.5}
    assert token_f1("", "") == 1
    assert token_f1("a", "") == 0
    assert token_f1("a b c", "b c d") == pytest.approx(2 / 3)


def test_content_leaves_out_what_rendering_adds() -> None:
    assert Text().content({"text": "t", "id": 7}) == "t"
    assert Chat().content({"instruction": "i", "input": "x", "output": "o", "id": 1}) == "i\no\nx"


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_generated_rows_can_be_read_and_are_the_same_for_the_same_seed(name: str) -> None:
    task = {"arithmetic": Arithmetic(consistent=True), "preferences": Preference(),
            "sentences": Text()}.get(name, Chat())  # fmt: skip
    rows = generate(name, 4, {"rows": 60})
    assert rows == generate(name, 4, {"rows": 60})
    assert rows != generate(name, 5, {"rows": 60})
    for row in rows:
        assert all(text.answer for text in task.render(row))
