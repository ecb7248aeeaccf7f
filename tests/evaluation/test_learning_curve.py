"""Fits recover curves that were made, and nested subsets nest."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.evaluation.learning_curve import LearningCurve, fit_curve, measure, nested_subsets
from anabranch.evaluation.plotting import svg
from anabranch.training.errors import DataError

SIZES = (50, 100, 200, 500, 1000)


@pytest.mark.parametrize("rate", [0.2, 0.5, 1.0])
def test_a_made_curve_is_recovered(rate: float) -> None:
    made = LearningCurve(0.9, 1.5, rate, 0, ())
    fitted = fit_curve([(n, made.accuracy(n)) for n in SIZES])
    assert fitted.ceiling == pytest.approx(0.9, abs=1e-3)
    assert fitted.rate == pytest.approx(rate, abs=1e-2)
    assert fitted.error < 1e-5


def test_rows_for_a_target_is_the_inverse() -> None:
    curve = fit_curve([(n, 0.9 - 1.5 * n**-0.5) for n in SIZES])
    rows = curve.rows_for(0.85)
    assert rows is not None and 880 <= rows <= 920
    assert curve.accuracy(rows) >= 0.85 > curve.accuracy(rows - 5)
    assert curve.rows_for(0.95) is None
    assert curve.rows_for(curve.accuracy(1) - 0.1) == 1


def test_a_flat_curve_is_fitted_and_never_reaches_more() -> None:
    flat = fit_curve([(n, 0.6) for n in SIZES])
    assert flat.error < 1e-3
    assert flat.rows_for(0.99) is None


def test_noise_does_not_leave_the_bounds() -> None:
    generator = np.random.default_rng(0)
    for _ in range(10):
        noisy = [(n, float(generator.uniform(0, 1))) for n in SIZES]
        curve = fit_curve(noisy)
        assert 0 <= curve.ceiling <= 1 and curve.gap >= 0 and 0 < curve.rate <= 2


def test_too_few_sizes_are_refused() -> None:
    with pytest.raises(DataError, match=r"at least three sizes"):
        fit_curve([(10, 0.5), (10, 0.6), (20, 0.7)])
    with pytest.raises(DataError, match="sizes must be 1 to 2"):
        nested_subsets(["a", "b"], [3])


@given(st.integers(0, 50), st.integers(5, 40), st.integers(5, 40))
def test_subsets_nest_and_keep_the_shares(seed: int, first: int, second: int) -> None:
    classes = ["a"] * first + ["b"] * second
    sizes = [2, 5, first + second]
    subsets = nested_subsets(classes, sizes, seed)
    rows = [subsets[size] for size in sizes]
    assert [len(chosen) for chosen in rows] == sizes
    assert set(rows[0]) < set(rows[1]) <= set(rows[2])
    assert len(set(rows[2])) == len(classes)
    share = Counter(classes[i] for i in rows[1])["a"] / 5
    assert abs(share - first / len(classes)) <= 2 / 5


def test_measuring_visits_every_size_and_seed() -> None:
    points = measure(lambda rows, seed: len(rows) / 100 + seed, ["a"] * 60, [10, 40], seeds=(0, 1))
    assert points == [(10, 0.1), (40, 0.4), (10, 1.1), (40, 1.4)]


def test_the_plot_has_points_curve_and_target() -> None:
    drawn = svg(fit_curve([(n, 0.9 - n**-0.5) for n in SIZES]).plot(levels={"human": 0.95}))
    assert "measured" in drawn and "human" in drawn and "labelled rows" in drawn
