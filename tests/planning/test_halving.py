"""Successive halving against its definition, tried out."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigurationError
from anabranch.planning import Rung, successive_halving, survivors


def by_trying(trials, rounds, factor, least):
    """The longest sequence of rungs, found by building all of them."""
    found = []
    for rungs in range(1, 12):
        numbers, budgets = [trials], [rounds]
        for _ in range(rungs - 1):
            numbers.append(numbers[-1] // factor)
            budgets.insert(0, rounds // factor ** len(budgets))
        if numbers[-1] >= 1 and least * factor ** (rungs - 1) <= rounds:
            found = [Rung(n, r) for n, r in zip(numbers, budgets, strict=True)]
    return tuple(found)


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("least", [1, 2, 5])
def test_the_rungs_are_those_found_by_trying(factor, least):
    for trials in range(1, 30):
        for rounds in range(least, 40):
            rungs = successive_halving(trials, rounds, factor, least)
            assert rungs == by_trying(trials, rounds, factor, least), (trials, rounds)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(2, 5), st.integers(1, 200))
def test_ever_fewer_trials_and_ever_more_rounds(trials, rounds, factor, least):
    least = min(least, rounds)
    rungs = successive_halving(trials, rounds, factor, least)
    assert rungs[0].trials == trials and rungs[-1].rounds == rounds
    assert all(rung.rounds >= least and rung.trials >= 1 for rung in rungs)
    for one, other in pairwise(rungs):
        assert other.rounds >= factor * one.rounds > 0 and other.trials * factor <= one.trials
    # No rung may cost more than all trials for the share of rounds that one in factor stands for.
    assert all(
        rung.trials * rung.rounds <= trials * rounds // factor ** (len(rungs) - 1) for rung in rungs
    )


def test_an_example():
    assert successive_halving(9, 9) == (Rung(9, 1), Rung(3, 3), Rung(1, 9))
    assert successive_halving(1, 7) == (Rung(1, 7),)
    assert successive_halving(8, 1) == (Rung(8, 1),)
    assert successive_halving(4, 10, factor=2, least=3) == (Rung(4, 5), Rung(2, 10))


def test_survivors_are_a_set_that_no_swap_makes_better():
    scores = [3.0, 1.0, math.nan, 2.0, 1.0, math.inf]
    for order in permutations(range(6)):
        mixed = [scores[i] for i in order]
        for keep in range(7):
            kept = survivors(mixed, keep)
            left = [i for i in range(6) if i not in kept]
            assert len(set(kept)) == keep
            assert not any(mixed[out] < mixed[in_] for in_ in kept for out in left)
            assert not any(math.isnan(mixed[i]) for i in kept[:5])
    assert survivors([1.0, 1.0, 1.0], 2) == [0, 1], "equal scores go by position"
    assert survivors([], 1) == []


@pytest.mark.parametrize("wrong", [(0, 5, 3, 1), (3, 5, 1, 1), (3, 5, 3, 6), (3, 5, 3, 0)])
def test_what_cannot_be_halved(wrong):
    with pytest.raises(ConfigurationError, match="successive halving needs"):
        successive_halving(*wrong)
