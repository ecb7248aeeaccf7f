"""Multiple choice against one forward pass for each choice, and what rows may look like."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch import registry
from anabranch.errors import ConfigurationError, UnknownName
from anabranch.evaluation.benchmarks.base import Result
from anabranch.evaluation.benchmarks.commonsense import published
from anabranch.evaluation.benchmarks.multiple_choice import (
    Choices,
    ChoicesFile,
    continuation,
    from_row,
    log_likelihoods,
)
from anabranch.training.errors import DataError, Diverged
from anabranch.training.plugins import construct
from tests.evaluation.benchmarks.helpers import network, subject, write_rows
from tests.training.tiny_base import tokenizer

QUESTIONS = [
    Choices("The sky is", ("blue", "a kind of cheese", "green"), 0, "one"),
    Choices("2 + 2 =", ("5", "4"), 1, "two"),
    Choices("", ("no question at all", "none"), 1, "three"),
    Choices("The cup does not fit as the _ is too big.", ("cup", "box"), 0, "four", blank=True),
]


def naive(given, scored):
    """Sum of the log-probabilities of one text's tokens, by hand."""
    ids = tokenizer()(given + scored)["input_ids"]
    before = len(tokenizer()(given)["input_ids"])
    if not before:
        ids, before = [tokenizer().eos_token_id, *ids], 1
    with torch.no_grad():
        logits = network()(torch.tensor([ids])).logits[0].double()
    chosen = logits.log_softmax(-1)[torch.arange(before - 1, len(ids) - 1), ids[before:]]
    return float(chosen.sum())


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_likelihoods_are_those_of_one_pass_for_each_choice(packing):
    found = log_likelihoods(subject(packing=packing, micro_batch_tokens=64), QUESTIONS)
    for question, row in zip(QUESTIONS, found, strict=True):
        np.testing.assert_allclose(row, [naive(*pair) for pair in question.texts()], rtol=1e-5)


def test_what_is_given_and_what_is_scored():
    assert QUESTIONS[0].texts()[0] == ("The sky is", " blue")
    assert QUESTIONS[2].texts()[0] == ("", "no question at all")
    assert QUESTIONS[3].texts() == [
        ("The cup does not fit as the cup", " is too big."),
        ("The cup does not fit as the box", " is too big."),
    ]
    assert Choices("Say: ", ("a", "b"), 0).texts()[0] == ("Say: ", "a")
    assert QUESTIONS[0].sizes().tolist() == [4, 16, 5]
    assert len(set(QUESTIONS[3].sizes())) == 1, "both score the same words"


def test_accuracy_raw_and_by_bytes(tmp_path):
    rows = [
        {"prompt": q.question, "choices": list(q.choices), "answer": q.answer}
        for q in QUESTIONS[:3]
    ]
    benchmark = ChoicesFile(write_rows(tmp_path / "mine.jsonl", rows))
    result = benchmark.examine(subject())
    sums = [np.array([naive(*pair) for pair in q.texts()]) for q in QUESTIONS[:3]]
    raw = np.mean([s.argmax() == q.answer for s, q in zip(sums, QUESTIONS[:3], strict=True)])
    by_bytes = np.mean(
        [(s / q.sizes()).argmax() == q.answer for s, q in zip(sums, QUESTIONS[:3], strict=True)]
    )
    assert (result.score, result.others["normalised"]) == (raw, by_bytes)
    assert result.rows == 3 and result.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert benchmark.label == "mine"
    assert result.figures("mine")["task/mine"] == raw


def test_as_a_conversation_the_end_of_the_turn_is_scored():
    asked = subject()
    question = QUESTIONS[0]
    found = log_likelihoods(asked, [question], "template")[0]
    for choice, value in zip(question.choices, found, strict=True):
        given = asked.template.prompt([{"role": "user", "content": question.question}])
        ids = [*given, *tokenizer()(choice)["input_ids"], tokenizer().eos_token_id]
        with torch.no_grad():
            scores = network()(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        before = len(given)
        expected = scores[torch.arange(before - 1, len(ids) - 1), ids[before:]].sum()
        assert value == pytest.approx(float(expected), rel=1e-5)


@given(st.text(max_size=20), st.text(min_size=1, max_size=20).filter(str.strip))
@settings(max_examples=60, deadline=None)
def test_given_and_scored_tokens_add_up_to_the_text(before, after):
    example = continuation(tokenizer(), before, after)
    scored = [t for t, mark in zip(example.tokens, example.trained, strict=True) if mark]
    assert tokenizer().decode(scored) == after
    assert not example.trained[0]


def test_limits_are_drawn_by_the_seed_and_are_subsets_in_order(tmp_path):
    rows = [{"prompt": str(i), "choices": ["a", "b"], "answer": i % 2} for i in range(40)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    asked = [[q.question for q in ChoicesFile(path, limit=7, seed=s).questions] for s in (0, 0, 1)]
    assert asked[0] == asked[1] != asked[2] and len(asked[0]) == 7
    assert asked[0] == sorted(asked[0], key=int)
    assert len(ChoicesFile(path, limit=1000).questions) == 40


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "choices": ["x", "y"]}, "w has no answer"),
        ({"prompt": "a", "choices": "x", "answer": 0}, "must be a list"),
        ({"prompt": "a", "choices": ["x", 3], "answer": 0}, "must be a list of texts"),
        ({"prompt": "a", "choices": ["x"], "answer": 0}, "two choices or more"),
        ({"prompt": "a", "choices": ["x", " "], "answer": 0}, "none of them empty"),
        ({"prompt": "a", "choices": ["x", "y"], "answer": 2}, "answer 2 is no choice"),
        ({"prompt": "a", "choices": ["x", "y"], "answer": "z"}, "neither one of the choices"),
        ({"prompt": "a", "choices": ["x", "y"], "answer": None}, "neither one of the choices"),
    ],
)
def test_rows_that_cannot_be_asked(row, says):
    with pytest.raises(DataError, match=says):
        from_row(row, "w")


def test_answers_by_number_and_by_text_and_choices_of_a_csv_file(tmp_path):
    assert from_row({"prompt": "a", "choices": ["x", "y"], "answer": "y"}, "w").answer == 1
    assert from_row({"prompt": "a", "choices": ["x", "y"], "answer": "1"}, "w").answer == 1
    path = tmp_path / "rows.csv"
    path.write_text('prompt,choices,answer\nq,"[""x"", ""y""]",y\n')
    assert ChoicesFile(path, "csv").questions == [Choices("q", ("x", "y"), 1, "rows.csv:2")]
    with pytest.raises(DataError, match="no questions"):
        ChoicesFile(write_rows(tmp_path / "none.jsonl", [])).questions  # noqa: B018


def test_a_question_that_is_too_long_and_a_model_that_diverged(tmp_path):
    with pytest.raises(DataError, match="two: the question takes 9 tokens, the model at most 8"):
        log_likelihoods(subject(context=8), [QUESTIONS[1]])
    weights = network().lm_head.weight
    kept = weights.detach().clone()
    with torch.no_grad():
        weights[ord("4")] = float("nan")
    try:
        with pytest.raises(Diverged, match="two is NaN"):
            log_likelihoods(subject(packing="none"), [QUESTIONS[1]])
    finally:
        with torch.no_grad():
            weights.copy_(kept)


ARC = (
    "Please choose the correct answer to the question: What: is hot?\n\nAnswer1: Ice: cold "
    "Answer2: fire Answer3: snow\n\nAnswer format: answer1/answer2/answer3"
)
PIQA = (
    "Please choose the correct solution to the question: Open a tin.\n\nSolution1: Use a spoon."
    "\n\nSolution2: Use an opener.\n\nAnswer format: solution1/solution2"
)
GAP = (
    "Please choose the correct answer to fill in the blank to complete the given sentence: The cup "
    "is in the box as the _ is big.\n\nOption1: cup Option2: box Answer format: option1/option2"
)
BOOLQ = (
    "Please answer the following question with true or false, question: is it so?\n\n"
    "Answer format: true/false"
)


def test_published_rows_are_taken_apart():
    def read(instruction, answer):
        return published({"instruction": instruction, "answer": answer}, "w")

    assert read(ARC, "answer2") == Choices(
        "Question: What: is hot?\nAnswer:", ("Ice: cold", "fire", "snow"), 1, "w"
    )
    assert read(PIQA, "solution2") == Choices(
        "Question: Open a tin.\nAnswer:", ("Use a spoon.", "Use an opener."), 1, "w"
    )
    assert read(GAP, "option1") == Choices(
        "The cup is in the box as the _ is big.", ("cup", "box"), 0, "w", blank=True
    )
    assert read(BOOLQ, "false") == Choices("Question: is it so?\nAnswer:", ("yes", "no"), 1, "w")
    for instruction, answer in ((ARC, "answer4"), (ARC, "fire"), ("nothing", "answer1")):
        with pytest.raises(DataError, match="w: the choices"):
            read(instruction, answer)
    with pytest.raises(DataError, match="both texts"):
        published({"instruction": ARC}, "w")


def test_published_sets_are_found_by_name(tmp_path, monkeypatch):
    row = {"instruction": ARC, "answer": "answer2", "input": "", "output": ""}
    write_rows(tmp_path / "reasoning-mcq" / "arc_easy.test.jsonl", [row] * 3)
    monkeypatch.setenv("ANABRANCH_DATA", str(tmp_path))
    benchmark = construct(registry.get("benchmarks", "arc-easy"), {"limit": 2}, "evaluations")
    assert [question.answer for question in benchmark.questions] == [1, 1]
    with pytest.raises(UnknownName, match="no file of the built-in set"):
        construct(registry.get("benchmarks", "piqa"), {}, "evaluations").questions  # noqa: B018
    with pytest.raises(ConfigurationError, match="did you mean 'limit'"):
        construct(registry.get("benchmarks", "arc-easy"), {"limits": 2}, "evaluations")
    with pytest.raises(ConfigurationError, match="limit is at least 1"):
        construct(registry.get("benchmarks", "arc-easy"), {"limit": 0}, "evaluations")
    monkeypatch.delenv("ANABRANCH_DATA")
    with pytest.raises(DataError, match="needs the environment variable ANABRANCH_DATA"):
        construct(registry.get("benchmarks", "boolq"), {}, "evaluations").questions  # noqa: B018


def test_the_standard_error_is_that_of_a_share():
    assert Result(0.5, 100).error == pytest.approx(0.05)
    assert Result(1.0, 3).error == 0.0
    found = Result(0.25, 4, 0.5, {"normalised": 0.75}).figures("x")
    assert found["task/x"] == 0.25 and found["task/x/normalised"] == 0.75
    assert found["task/x/chance"] == 0.5 and found["task/x/rows"] == 4
