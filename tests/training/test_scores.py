"""Likelihoods and answers against the plain computation, and the statistics on top."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM

from anabranch.training.recipe import Generate
from anabranch.training.score_statistics import (
    difference_of_scores,
    difference_per_token,
    mcnemar,
    mean_per_token,
)
from anabranch.training.scores import generate_answers, score_answers
from tests.tiny import llama
from tests.training import helpers
from tests.training.tiny_base import END, encode, tokenizer, write_base


def test_answer_likelihoods_are_those_of_the_plain_forward_pass() -> None:
    model = llama()
    items = helpers.pairs(5)
    nll, tokens = score_answers(model, items, micro_batch_tokens=64)
    for item, sums, counts in zip(items, nll, tokens, strict=True):
        for example, total, count in zip(item, sums, counts, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([list(example.tokens)])).logits[0].double()
            logp = logits.log_softmax(-1)
            plain = -sum(
                float(logp[t - 1, example.tokens[t]])
                for t in range(1, len(example))
                if example.trained[t]
            )
            assert total == pytest.approx(plain, abs=1e-3)
            assert count == example.targets


def test_answers_do_not_depend_on_the_batch(tmp_path: object) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_base(tmp_path)).eval()  # type: ignore[arg-type]
    prompts = [encode(text) for text in ("a", "some longer question?", "hm hm")]
    alone = generate_answers(model, tokenizer(), prompts, [END], Generate(max_tokens=6, batch=1))
    together = generate_answers(model, tokenizer(), prompts, [END], Generate(max_tokens=6, batch=3))
    assert alone == together
    for prompt, answer in zip(prompts, alone, strict=True):
        output = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        text = tokenizer().decode(output[0, len(prompt) :], skip_special_tokens=True)
        assert answer == text
    assert generate_answers(model, tokenizer(), [], [END], Generate()) == []


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_mcnemar_is_the_exact_binomial_test(pairs: list[tuple[bool, bool]]) -> None:
    base, tuned = [b for b, _ in pairs], [t for _, t in pairs]
    gained = sum(t and not b for b, t in pairs)
    discordant = sum(b != t for b, t in pairs)
    wanted = binomtest(gained, discordant).pvalue if discordant else 1.0
    assert mcnemar(base, tuned) == pytest.approx(wanted)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        tokens = generator.integers(5, 40, 60).astype(float)
        nll = tokens * generator.normal(2.0, 0.5, 60)
        interval = mean_per_token(nll, tokens, seed=trial)
        assert interval.low <= interval.value <= interval.high
        covered += interval.low <= 2.0 <= interval.high
    assert covered >= 88


def test_pairing_sees_a_difference_that_single_intervals_hide() -> None:
    generator = np.random.default_rng(1)
    tokens = np.full(50, 10.0)
    base = tokens * generator.normal(3.0, 1.0, 50)
    tuned = base - 0.05 * tokens
    assert difference_per_token(tuned, base, tokens).excludes_zero
    assert mean_per_token(tuned, tokens).high > mean_per_token(base, tokens).low


def test_scores_are_resampled_row_by_row() -> None:
    right = [True] * 8 + [False] * 2
    interval = difference_of_scores(
        lambda rows: sum(right[i] for i in rows) / len(rows), lambda rows: 0.0, 10
    )
    assert interval.value == 0.8
    assert 0.4 <= interval.low < 0.8 < interval.high <= 1.0


def test_without_rows_there_is_no_figure() -> None:
    empty = np.array([])
    assert math.isnan(mean_per_token(empty, empty).value)
    assert mcnemar([], []) == 1.0
