"""Tokens and loss masks, compared with references written out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigurationError
from anabranch.training.errors import DataError
from anabranch.training.example import Example
from anabranch.training.task import Message, Rendered
from anabranch.training.tasks.chat import Chat
from anabranch.training.template import Template
from tests.training.tiny_base import END, START, encode, tokenizer


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def example(template: str, *messages: Message) -> Example:
    return Template(template, tokenizer()).example(Rendered(messages))


def trained_texts(made: Example) -> list[list[int]]:
    """Runs of trained tokens."""
    runs: list[list[int]] = [[]]
    for token, trained in zip(made.tokens, made.trained, strict=True):
        if trained:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def test_chat_of_one_turn_by_hand() -> None:
    made = example("chat", turn("user", "Hi"), turn("assistant", "Yes!"))
    prompt = [START, *encode("user\nHi"), END, *encode("\n"), START, *encode("assistant\n")]
    answer = [*encode("Yes!"), END]
    assert made.tokens == [*prompt, *answer, *encode("\n")]
    assert made.trained == [False] * len(prompt) + [True] * len(answer) + [False]


def test_every_assistant_turn_counts_with_its_end_token_and_nothing_else() -> None:
    made = example(
        "chat",
        turn("system", "Be brief."),
        turn("user", "assistant\n"),  # looks like a header, is not
        turn("assistant", "One"),
        turn("user", "More"),
        turn("tool", "42"),
        turn("assistant", "Two\n\nlines"),
    )
    assert trained_texts(made) == [[*encode("One"), END], [*encode("Two\n\nlines"), END]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(max_size=8), st.text(min_size=1, max_size=8)), min_size=1, max_size=4
    )
)
def test_masks_hold_for_any_text(turns: list[tuple[str, str]]) -> None:
    messages = [m for q, a in turns for m in (turn("user", q), turn("assistant", a))]
    made = example("chat", *messages)
    assert trained_texts(made) == [[*encode(a), END] for _, a in turns]
    prompt = Template("chat", tokenizer()).prompt(messages[:1])
    assert made.tokens[: len(prompt)] == prompt  # what a server computes for the question


def test_turns_of_weight_0_are_read_and_not_learned() -> None:
    turns: list[dict[str, object]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bad", "weight": 0},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "good", "weight": 1},
        {"role": "developer", "content": "c"},
        {"role": "assistant", "content": "fine"},
    ]
    (rendered,) = Chat().render({"messages": turns})
    assert [message["role"] for message in rendered.messages][4] == "system"
    made = Template("chat", tokenizer()).example(rendered)
    whole = Template("chat", tokenizer()).example(Rendered(rendered.messages))
    assert made.tokens == whole.tokens
    assert trained_texts(made) == [[*encode("good"), END], [*encode("fine"), END]]
    for weight in (0.5, "0", 2):
        turns[1]["weight"] = weight
        with pytest.raises(DataError, match=r"messages\[1\] has the weight"):
            Chat().render({"messages": turns})


def test_alpaca_by_hand() -> None:
    made = example("alpaca", turn("user", "Add."), turn("assistant", "2"))
    prompt = encode(
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert made.tokens == [*prompt, *encode("2"), END]
    assert trained_texts(made) == [[*encode("2"), END]]


def test_alpaca_of_two_turns_trains_both() -> None:
    made = example(
        "alpaca",
        turn("user", "A"),
        turn("assistant", "x"),
        turn("user", "B"),
        turn("assistant", "y"),
    )
    assert trained_texts(made) == [[*encode("x"), END], [*encode("y"), END]]


def test_raw_text_trains_all_but_the_first_token() -> None:
    made = Template("raw", tokenizer()).example(Rendered(text="abc"))
    assert made.tokens == [*encode("abc"), END]
    assert made.trained == [False, True, True, True]


def test_raw_conversation() -> None:
    made = example("raw", turn("user", "2+2="), turn("assistant", "4"))
    assert made.tokens == [*encode("2+2=\n4"), END]
    assert trained_texts(made) == [[*encode("4"), END]]


def test_a_template_without_end_token_gets_one(tmp_path: Path) -> None:
    file = tmp_path / "plain.jinja"
    file.write_text("{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
                    "{% if add_generation_prompt %}a:{% endif %}")  # fmt: skip
    made = example(str(file), turn("user", "q"), turn("assistant", "r"))
    assert made.tokens == [*encode("u:q;a:r;"), END]
    assert trained_texts(made) == [[*encode("r;"), END]]


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "think.jinja"
    file.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}(cut)"
        "{% else %}{{ m.content }}{% endif %}|{% endfor %}"
    )
    one = (turn("user", "q"), turn("assistant", "long answer"))
    example(str(file), *one)
    with pytest.raises(DataError, match=r"turn 4 .* changes the text before it"):
        example(str(file), *one, turn("user", "q"), turn("assistant", "r"))


def test_templates_that_cannot_work_say_so(tmp_path: Path) -> None:
    bare = tokenizer().__class__(tokenizer_object=tokenizer().backend_tokenizer)
    with pytest.raises(ConfigurationError, match=r"use alpaca, raw or a \.jinja file"):
        Template("chat", bare)
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for m in messages %}\n{% if %}")
    with pytest.raises(ConfigurationError, match=r"broken\.jinja:2"):
        Template(str(broken), tokenizer())
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Template(str(tmp_path / "missing.jinja"), tokenizer())


def test_the_models_own_end_tokens_end_an_answer_too() -> None:
    stop = encode("!")[0]
    made = Template("chat", tokenizer(), [stop]).example(
        Rendered((turn("user", "q"), turn("assistant", "Go! now")))
    )
    assert trained_texts(made) == [[*encode("Go! now"), END]]


def test_sentencepiece_style_tokenizers_are_tokenised_as_a_whole() -> None:
    """A dummy space before the first word must not appear at every cut."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz#:<>/"]
    core = Tokenizer(BPE({c: i for i, c in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<")
    made.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
        "{% if m.role == 'assistant' %}<{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    result = Template("chat", made).example(
        Rendered((turn("user", "hi "), turn("assistant", "yes no")))
    )
    tokens = made.convert_ids_to_tokens(result.tokens)
    assert tokens == list("\u2581u:hi\u2581a:yes\u2581no<")
    trained = [token for token, counts in zip(tokens, result.trained, strict=True) if counts]
    assert "".join(trained) == "yes\u2581no<"
