"""The classification task: rendering, total parsers, and labels scored against naive passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch import registry
from anabranch.errors import ConfigurationError
from anabranch.training.annotation.scoring import Asker, inner_nodes
from anabranch.training.errors import DataError
from anabranch.training.tasks.classification import FORMS, ClassificationTask
from anabranch.training.template import Template
from tests import tiny

LABELS = ("health care", "trade", "Trade unions", "arts & culture")
TASKS = {
    (kind, form): ClassificationTask(LABELS, kind, answer_form=form)
    for kind, forms in FORMS.items()
    for form in forms
}
VALUES: dict[str, Any] = {
    "single": "Trade unions",
    "multi": frozenset({"trade", "arts & culture"}),
    "valued": {"health care": "high", "trade": "low"},
}


def test_is_found_by_name() -> None:
    assert registry.get("tasks", "classification") is ClassificationTask


@pytest.mark.parametrize(("kind", "form"), TASKS)
def test_what_is_rendered_is_read_back(kind: str, form: str) -> None:
    task = TASKS[kind, form]  # type: ignore[index]
    column = "label" if kind == "single" else "labels"
    (rendered,) = task.render({"text": "  A question. ", column: VALUES[kind]})
    assert "Text: A question." in rendered.question
    assert "health care" in rendered.question
    assert task.parse(rendered.answer) == VALUES[kind]
    assert task.score([task.parse(rendered.answer)], [VALUES[kind]])["accuracy"] == 1


@pytest.mark.parametrize(("kind", "form"), TASKS)
@given(text=st.one_of(st.text(), st.text(alphabet='[]{}",:=1234567890 \nAnswer low high trade')))
def test_parsers_are_total(kind: str, form: str, text: str) -> None:
    task = TASKS[kind, form]  # type: ignore[index]
    value = task.read(text).value
    if value is None:
        return
    if kind == "single":
        assert value in LABELS
    elif kind == "multi":
        assert value <= set(LABELS)
    else:
        assert set(value) <= set(LABELS) and set(value.values()) <= {"low", "medium", "high"}


@pytest.mark.parametrize(
    ("form", "text", "value"),
    [
        ("label", "Trade.", "trade"),
        ("label", "trade unions", "Trade unions"),
        ("label", "I think it is TRADE UNIONS, not trade", "Trade unions"),
        ("label", "Arts/Culture", "arts & culture"),
        ("label", "sport", None),
        ("label", "", None),
        ("number", "Answer = [2].", "trade"),
        ("number", "answer=3", "Trade unions"),
        ("number", "1", "health care"),
        ("number", "Answer = [0].", None),
        ("number", "Answer = [5].", None),
        ("number", "9" * 9999, None),
        ("list", '["trade", "sport"]', frozenset({"trade"})),
        ("list", "trade; health care", frozenset({"trade", "health care"})),
        ("list", "[]", frozenset()),
        ("list", "none", frozenset()),
        ("list", '["sport"]', None),
        ("list", '["trade", "hea', frozenset({"trade"})),
        ("list", "", None),
        ("dictionary", "{}", {}),
        ("dictionary", "{'Trade': 'HIGH', 'sport': 'low'}", {"trade": "high"}),
        ("dictionary", '{"trade": "low", "trade": "medium"}', {"trade": "low"}),
        ("dictionary", '{"trade": "low", "trade": "high"}', {"trade": "high"}),
        ("dictionary", "trade: medium", {"trade": "medium"}),
        ("dictionary", '{"trade": "enormous"}', None),
        ("dictionary", "words", None),
    ],
)
def test_answers_as_models_write_them(form: str, text: str, value: Any) -> None:
    task = next(task for (_, f), task in TASKS.items() if f == form)
    assert task.parse(text) == value


def test_unknown_names_are_reported() -> None:
    assert TASKS["multi", "list"].read('["trade", "sport", "law"]').unknown == ("sport", "law")
    assert TASKS["valued", "dictionary"].read('{"trade": "huge"}').unknown == ("huge",)


def test_aliases_stand_for_labels_and_values() -> None:
    task = ClassificationTask(
        ["joy", "grief"], "valued", aliases={"happiness": "joy", "strong": "high"}
    )
    assert task.parse('{"Happiness": "strong"}') == {"joy": "high"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x", "label": "trad"}, "'trad' is not in the list .did you mean 'trade'"),
        ({"text": "x"}, "cannot read a row with the columns text"),
        ({"text": None, "label": "trade"}, "'text' must be text"),
    ],
)
def test_rows_that_do_not_fit_are_refused(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TASKS["single", "label"].render(row)


def test_sets_and_values_that_do_not_fit_are_refused() -> None:
    multi, valued = TASKS["multi", "list"], TASKS["valued", "dictionary"]
    with pytest.raises(DataError, match="must list labels"):
        multi.reference({"text": "x", "labels": 3})
    assert multi.reference({"text": "x", "labels": "trade, health care"}) == {
        "trade",
        "health care",
    }
    assert multi.reference({"text": "x", "labels": []}) == frozenset()
    with pytest.raises(DataError, match="must map labels"):
        valued.reference({"text": "x", "labels": ["trade"]})
    with pytest.raises(DataError, match="value 'huge'"):
        valued.reference({"text": "x", "labels": {"trade": "huge"}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": []}, "needs labels"),
        ({"labels": ["a", "A."]}, "read the same"),
        ({"labels": ["!"]}, "letters or digits"),
        ({"labels": ["a"], "kind": "double"}, "kind must be one of"),
        ({"labels": ["a"], "answer_form": "list"}, "answer_form of kind 'single'"),
        ({"labels": ["a"], "prompt": "hello"}, "lacks {text}"),
        ({"labels": ["ab"], "aliases": {"x": "abc"}}, "did you mean 'ab'"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ClassificationTask(**options)


def test_score_counts_what_was_not_read_as_wrong() -> None:
    figures = TASKS["single", "label"].score(["trade", None], ["trade", "trade"])
    assert figures["accuracy"] == figures["read"] == 0.5
    assert TASKS["single", "label"].score([], []) == {}


# Label scoring on a tiny model whose tokens are bytes: labels share beginnings.
WORDS = ("pos", "positive", "neg", "negligible", "n")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama()


def asker(model: Any, labels: tuple[str, ...] = WORDS, **options: Any) -> Asker:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.eos_token = "!"
    task = ClassificationTask(labels, prompt="Say: {text}")
    return Asker(model, tokenizer, Template("raw", tokenizer), task, **options)


@torch.no_grad()
def naive(model: Any, text: str, constrained: bool) -> np.ndarray:
    """Every label alone, in a pass of its own."""
    encode = tiny.byte_tokenizer().encode
    prompt = encode(f"Say: {text}\n")
    paths = [encode(word + "!") for word in WORDS]
    found = []
    for path in paths:
        logits = model(torch.tensor([prompt + path])).logits[0].double()
        total = 0.0
        for depth, token in enumerate(path):
            row = logits[len(prompt) - 1 + depth]
            if constrained:
                siblings = sorted({p[depth] for p in paths if p[:depth] == path[:depth]})
                row = row[siblings]
                token = siblings.index(token)
            total += float(row.log_softmax(-1)[token])
        found.append(total)
    scores = np.array(found)
    return scores if constrained else scores - np.logaddexp.reduce(scores)


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("cells", [1, 10_000])
def test_scores_equal_separate_passes_whatever_shares_a_batch(
    model: Any, constrained: bool, cells: int
) -> None:
    texts = ["a", "a much longer text than the first one", "short", "a"]
    scores = asker(model, cells=cells).scores(texts, constrained)
    expected = np.stack([naive(model, text, constrained) for text in texts])
    assert np.allclose(scores.log_probabilities, expected, atol=1e-4)
    assert np.allclose(np.exp(scores.log_probabilities).sum(axis=1), 1, atol=1e-6)
    assert scores.best == [WORDS[i] for i in expected.argmax(axis=1)]
    assert scores.cut == ()


def test_only_branching_beginnings_are_computed() -> None:
    paths = [(1, 2, 9), (1, 3, 9), (4, 5, 6, 9)]
    assert inner_nodes(paths, branching_only=True) == [(1,)]
    assert inner_nodes(paths, branching_only=False) == [
        (1,), (4,), (1, 2), (1, 3), (4, 5), (4, 5, 6),
    ]  # fmt: skip
    assert inner_nodes([(1, 9), (2, 9)], branching_only=True) == []


def test_no_texts_give_no_scores(model: Any) -> None:
    assert asker(model).scores([]).log_probabilities.shape == (0, len(WORDS))
    assert asker(model).answers([]) == []


def test_a_text_longer_than_the_context_loses_its_middle_and_is_flagged(model: Any) -> None:
    small = asker(model, context=100, answer_tokens=20)
    long = "A" * 200 + "B" * 200 + "C" * 200
    scores = small.scores([long, "short"])
    assert scores.cut == (0,)
    (prompt, _), _ = small._prompts([long, "short"])
    text = tiny.byte_tokenizer().decode(prompt)
    assert 70 <= len(prompt) <= 80
    assert text.startswith("Say: AAA") and text.endswith("CCC\n") and "B" not in text
    with pytest.raises(ConfigurationError, match="leaves no room for a text"):
        asker(model, context=30, answer_tokens=20)


def test_written_answers_stop_at_the_end_token(model: Any) -> None:
    answers = asker(model, answer_tokens=8).answers(["one", "two"])
    assert len(answers) == 2
    assert all("!" not in answer for answer in answers)


def test_scoring_refuses_several_labels_and_labels_with_the_same_tokens(model: Any) -> None:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.eos_token = "!"
    task = ClassificationTask(["a", "b"], "multi", prompt="Say: {text}")
    with pytest.raises(ConfigurationError, match="single labels"):
        Asker(model, tokenizer, Template("raw", tokenizer), task).scores(["x"])
