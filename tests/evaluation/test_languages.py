"""The synthetic languages: repeatable, different, and learnable."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import torch

from anabranch.evaluation.adapter_comparison import Problem, measure_base
from anabranch.evaluation.languages import Language, pretrained


def test_a_language_is_its_seed() -> None:
    first, again, other = Language(1), Language(1), Language(2)
    assert first.items(3, 40, 5) == again.items(3, 40, 5) != first.items(3, 40, 6)
    assert len(set(first.words) & set(other.words)) < 5


def test_texts_are_words_that_may_follow_each_other() -> None:
    language = Language(3, words=10, successors=2)
    follows = {
        word: {language.words[j] for j in language._next[i]}
        for i, word in enumerate(language.words)
    }
    words = language.text(2000, np.random.default_rng(0)).split(" ")[:-1]  # the last may be cut
    assert len(words) > 300
    assert all(after in follows[word] for word, after in itertools.pairwise(words))


def test_items_have_the_asked_length_and_predict_all_but_the_first() -> None:
    for (example,) in Language(1).items(5, 17, 0):
        assert len(example) == 17 and example.targets == 16


def test_a_pretrained_base_knows_its_own_language() -> None:
    language = Language(1, words=6, successors=1)
    base = pretrained(language, steps=40, layers=1, width=32, length=24, batch=8)
    assert not any(p.requires_grad for p in base.parameters()) and not base.training
    own, other = language.items(8, 24, 9), Language(2).items(8, 24, 9)
    weights = copy.deepcopy(base.state_dict())
    before = measure_base(base, Problem(own, valid=other, general=own))
    assert before.general < 0.7 * before.nll
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())
