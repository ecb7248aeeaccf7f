"""How much fine-tuning a step takes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.serving.coserving.share import ON_TIME, SLOWDOWN, Allowance, _largest


@given(
    fixed=st.floats(0, 1), slope=st.floats(1e-6, 1), limit=st.integers(1, 500), most=st.floats(0, 9)
)
def test_the_largest_that_fits_equals_trying_all(
    fixed: float, slope: float, limit: int, most: float
) -> None:
    def cost(rows: int) -> float:
        return fixed + slope * rows

    fitting = [rows for rows in range(limit + 1) if cost(rows) <= most]
    expected = max(fitting, default=0)
    assert _largest(cost, limit, most) == (expected if expected >= min(8, limit) else 0)


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_a_target_is_met_as_often_as_wanted(noise: float) -> None:
    """Steps take what was allowed on average, and vary."""
    rng, allowance, late = random.Random(0), Allowance(0.1), 0
    for step in range(6000):
        seconds = allowance.seconds(0.02) * rng.lognormvariate(0, noise)
        allowance.used(0.02, max(0.0, seconds - 0.02), seconds)
        late += step >= 1000 and seconds > 0.1
    assert late / 5000 == pytest.approx(1 - ON_TIME, abs=0.01)


def test_steps_that_were_late_by_themselves_change_nothing() -> None:
    allowance = Allowance(0.1)
    before = allowance.seconds(0.05)
    for _ in range(1000):
        allowance.used(0.15, 0.0, 0.15)
    assert allowance.seconds(0.05) == before
    for _ in range(1000):
        allowance.used(0.05, 0.1, 0.15)
    assert allowance.seconds(0.05) > 0.05  # fine-tuning never gives up for good


def test_without_a_target_requests_slow_down_by_a_quarter_on_average() -> None:
    allowance, spent = Allowance(None), 0.0
    for _ in range(1000):
        unit = 0.03  # three times what is left of one step
        left = allowance.seconds(0.04) - 0.04
        taken = unit if left >= unit else 0.0
        allowance.used(0.04, taken, 0.04 + taken)
        spent += taken
    assert spent / (1000 * 0.04) == pytest.approx(SLOWDOWN, rel=0.05)
    for _ in range(1000):
        allowance.used(0.04, 0.0, 0.04)
    assert allowance.seconds(0.04) <= 0.04 * (1 + SLOWDOWN * 21) * 1.001
