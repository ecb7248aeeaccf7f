"""The benchmark's arithmetic: noise that favours neither side decides nothing."""

from __future__ import annotations

import random

import pytest

from benchmarks.console import Ratio, Slice, paired, verdict


def slices(tabs_cost: float, noise: float, rounds: int = 15, seed: int = 0) -> list[Slice]:
    """ABBA on a machine that gets twice as slow on the way, with noise on each slice."""
    draw = random.Random(seed)
    made: list[Slice] = []
    for index in range(rounds):
        for tabs in (0, 20, 20, 0):
            speed = 300 * (1 - index / (2 * rounds)) * draw.lognormvariate(0, noise)
            cost = tabs_cost if tabs else 0.0
            made.append(Slice(tabs, speed * (1 - cost), (1 + cost) / speed, 1.0))
    return made


def judged(made: list[Slice]) -> str:
    return verdict(paired(made, "tokens_per_second"), paired(made, "processor_per_token"))


def test_a_machine_that_gets_slower_favours_neither() -> None:
    ratio = paired(slices(0.03, noise=0.0), "tokens_per_second")
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((0.97, 0.97, 0.97))
    assert ratio.pairs == 30


def test_verdicts() -> None:
    assert judged(slices(0.01, noise=0.02)) == "holds"
    assert judged(slices(0.15, noise=0.02)) == "falls short"
    assert judged(slices(0.05, noise=0.3)) == "undecided"


def test_the_interval_is_that_of_the_binomial_distribution() -> None:
    assert Ratio.of(range(1, 31)) == Ratio(15.5, 10, 21, 30)  # tables of the sign test
    assert Ratio.of([1, 2, 3, 4, 5, 6]) == Ratio(3.5, 1, 6, 6)
    with pytest.raises(ValueError, match="5 pairs are too few"):
        Ratio.of([1, 2, 3, 4, 5])


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    ratios = [paired(slices(0.0, 0.1, seed=seed), "tokens_per_second") for seed in range(200)]
    inside = sum(each.low <= 1.0 <= each.high for each in ratios)
    assert inside >= 0.93 * 200
