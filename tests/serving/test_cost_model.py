"""The cost model against the machines that it is supposed to learn."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from anabranch.planning.cost import (
    FIRST_FIT,
    MOST_SURPRISES,
    REFIT_EVERY,
    WINDOW,
    CostModel,
    _non_negative,
)

MACHINE = (8e-3, 3.5e-4, 2e-7)
coefficients = st.one_of(st.just(0.0), st.floats(1e-6, 1.0))


def seconds_of(machine: tuple[float, float, float], tokens: int, context: int) -> float:
    return machine[0] + machine[1] * tokens + machine[2] * context


def run(
    model: CostModel,
    steps: int,
    machine: tuple[float, float, float] = MACHINE,
    noise: float = 0.0,
    seed: int = 0,
) -> None:
    """Observe steps of random size, with a relative error of ``noise``."""
    dice = random.Random(seed)
    for _ in range(steps):
        tokens = dice.randint(1, 300)
        context = tokens + dice.randint(0, 20_000)
        factor = max(0.2, dice.gauss(1.0, noise))
        model.observe(tokens, context, factor * seconds_of(machine, tokens, context))


def error(model: CostModel, machine: tuple[float, float, float]) -> float:
    """Largest relative error over the range of steps that were observed."""
    sizes = [(1, 1), (1, 20_000), (64, 64), (64, 5000), (300, 300), (300, 20_000)]
    return max(abs(model.predict(*s) / seconds_of(machine, *s) - 1) for s in sizes)


class TestFit:
    def test_recovers_exact_coefficients(self) -> None:
        model = CostModel()
        run(model, REFIT_EVERY)
        assert (model.fixed, model.per_token, model.per_context) == pytest.approx(MACHINE, rel=1e-6)
        assert error(model, MACHINE) < 1e-6

    @pytest.mark.parametrize("seed", range(5))
    def test_recovers_coefficients_from_noisy_steps(self, seed: int) -> None:
        model = CostModel()
        run(model, WINDOW, noise=0.1, seed=seed)
        assert (model.fixed, model.per_token) == pytest.approx(MACHINE[:2], rel=0.1)
        assert model.per_context == pytest.approx(MACHINE[2], rel=0.3)

    @given(
        steps=st.lists(
            st.tuples(st.integers(1, 4096), st.integers(0, 10**6), st.floats(1e-6, 1e3)),
            min_size=REFIT_EVERY,
            max_size=REFIT_EVERY,
        )
    )
    @settings(max_examples=50, deadline=None)
    def test_is_never_negative_whatever_was_observed(
        self, steps: list[tuple[int, int, float]]
    ) -> None:
        model = CostModel()
        for tokens, context, seconds in steps:
            model.observe(tokens, tokens + context, seconds)
        assert min(model.fixed, model.per_token, model.per_context) >= 0
        assert model.fitted
        assert np.isfinite(model.predict(1, 1)) and model.predict(1, 1) >= 0

    @given(seed=st.integers(0, 10**6))
    @settings(max_examples=100, deadline=None)
    def test_no_other_non_negative_coefficients_are_better(self, seed: int) -> None:
        """The conditions of optimality: no gradient where it is free, none inwards at zero."""
        generator = np.random.default_rng(seed)
        features = generator.normal(size=(20, 3)) * [1.0, 100.0, 0.01]
        target = generator.normal(size=20)
        solution = np.array(_non_negative(features, target))
        gradient = features.T @ (features @ solution - target) / np.linalg.norm(features, axis=0)
        assert (solution >= 0).all()
        assert (abs(gradient[solution > 0]) < 1e-6).all()
        assert (gradient[solution == 0] > -1e-6).all()

    def test_predicts_steps_of_a_single_stream(self) -> None:
        """Always one token: what is fixed and what is per token cannot be told apart."""
        model = CostModel()
        for context in range(100, 100 + REFIT_EVERY):
            model.observe(1, context, seconds_of(MACHINE, 1, context))
        assert model.predict(1, 120) == pytest.approx(seconds_of(MACHINE, 1, 120), rel=1e-6)

    def test_a_clock_that_stands_still_teaches_nothing(self) -> None:
        model = CostModel()
        for tokens in range(1, 2 * REFIT_EVERY):
            model.observe(tokens, tokens, 0.0)
        assert not model.fitted
        run(model, REFIT_EVERY)
        assert error(model, MACHINE) < 1e-6

    def test_starts_without_a_prediction(self) -> None:
        model = CostModel()
        run(model, FIRST_FIT - 1)
        assert not model.fitted
        run(model, 1)
        assert model.fitted

    def test_steps_unlike_the_fitted_ones_are_learned_at_once(self) -> None:
        """Steps of one size say nothing about those of another."""
        model = CostModel()
        for _ in range(WINDOW):
            model.observe(100, 0, seconds_of(MACHINE, 100, 0))
        model.fixed, model.per_token = 0.0, seconds_of(MACHINE, 100, 0) / 100
        for tokens in range(1, MOST_SURPRISES + 1):
            assert model.predict(tokens, 10 * tokens) < 0.5 * seconds_of(MACHINE, tokens, 0)
            model.observe(tokens, 10 * tokens, seconds_of(MACHINE, tokens, 10 * tokens))
        assert model.predict(2, 20) == pytest.approx(seconds_of(MACHINE, 2, 20), rel=0.01)
        assert model.predict(100, 0) == pytest.approx(seconds_of(MACHINE, 100, 0), rel=0.01)


class TestInverse:
    @given(
        fixed=coefficients,
        per_token=coefficients,
        per_context=coefficients,
        correction=st.floats(0.25, 4.0),
        seconds=st.floats(1e-6, 100.0),
        context=st.integers(0, 1000),
    )
    def test_is_the_most_tokens_within_the_time(
        self,
        fixed: float,
        per_token: float,
        per_context: float,
        correction: float,
        seconds: float,
        context: int,
    ) -> None:
        assume(per_token > 0)
        model = CostModel(fixed, per_token, per_context, correction)
        tokens = model.invert(seconds, context)
        assert tokens >= 0
        assert tokens == 0 or model.predict(tokens, context) <= seconds * (1 + 1e-9)
        assert model.predict(tokens + 1, context) > seconds * (1 - 1e-9)

    def test_is_unlimited_if_tokens_cost_nothing(self) -> None:
        assert CostModel(fixed=1.0).invert(2.0) >= 2**31
        assert CostModel(fixed=1.0).invert(0.5) == 0


class TestSaturation:
    @given(
        ratio=st.floats(0.0, 500.0), per_token=st.floats(1e-6, 1.0), fraction=st.floats(0.05, 0.95)
    )
    def test_is_the_fewest_tokens_that_reach_the_fraction(
        self, ratio: float, per_token: float, fraction: float
    ) -> None:
        model = CostModel(fixed=ratio * per_token, per_token=per_token)

        def reached(tokens: int) -> float:
            return tokens / model.predict(tokens, 0) * per_token  # of 1 / per_token, the best

        found = model.saturating_tokens(fraction)
        wanted = next(tokens for tokens in range(1, 10_000) if reached(tokens) >= fraction)
        assert found == wanted or reached(min(found, wanted)) == pytest.approx(fraction, rel=1e-9)

    def test_of_the_machine_of_the_sheet(self) -> None:
        assert CostModel(8e-3, 3.5e-4).saturating_tokens() == 130

    def test_is_one_if_tokens_cost_nothing(self) -> None:
        assert CostModel(fixed=1.0).saturating_tokens() == 1


class TestCorrection:
    slower = (2 * MACHINE[0], 2 * MACHINE[1], 2 * MACHINE[2])

    @pytest.mark.parametrize("noise", [0.0, 0.1])
    def test_follows_a_machine_that_becomes_twice_as_slow(self, noise: float) -> None:
        model = CostModel()
        run(model, WINDOW, noise=noise)
        run(model, 30, self.slower, noise)
        assert error(model, self.slower) < 0.2

    def test_keeps_what_it_followed_when_the_coefficients_are_fitted_again(self) -> None:
        """The window is still full of steps from before; their fit alone would forget it."""
        model = CostModel()
        run(model, WINDOW)
        for step in range(2 * WINDOW):
            run(model, 1, self.slower, seed=step)
            assert step < 30 or error(model, self.slower) < 0.25, f"after {step} steps"
        assert error(model, self.slower) < 1e-3

    @pytest.mark.parametrize("factor", [1e-6, 0.1, 10.0, 1e6])
    def test_one_outlier_moves_it_little(self, factor: float) -> None:
        model = CostModel()
        run(model, REFIT_EVERY)
        model.observe(100, 1000, factor * seconds_of(MACHINE, 100, 1000))
        assert error(model, MACHINE) <= 0.3 + 1e-6
        run(model, 20)
        assert error(model, MACHINE) < 0.05
