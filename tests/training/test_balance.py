"""Balancers: sums, floors, constructed slopes, and state that continues."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch import registry
from anabranch.errors import ConfigurationError
from anabranch.training.errors import CheckpointError, DataError, Diverged
from anabranch.training.example import Example
from anabranch.training.losses.balance import (
    Balancer,
    CoBa,
    SelfPaced,
    SizeInverse,
    Static,
    Uniform,
    coba_weights,
    divergence_factor,
    slope,
)
from anabranch.training.losses.balance_hook import BalanceHook

SIZES = {"copy": 4000, "reverse": 2000, "add": 200}


def every_kind(sizes: dict[str, int]) -> list[Balancer]:
    return [
        Uniform(sizes),
        Static(sizes, {task: i + 1 for i, task in enumerate(sizes)}),
        SizeInverse(sizes),
        SelfPaced(sizes, window=5),
        CoBa(sizes, warmup=2, window=5),
    ]


losses = st.floats(0.01, 1e3)


@given(st.lists(st.tuples(losses, losses, losses), min_size=1, max_size=12))
def test_weights_are_a_distribution_after_any_history(history: list[tuple[float, ...]]) -> None:
    for balancer in every_kind(SIZES):
        for step, row in enumerate(history):
            balancer.observe(step, dict(zip(SIZES, row, strict=True)))
            weights = balancer.weights(step)
            assert set(weights) == set(SIZES)
            assert math.isclose(sum(weights.values()), 1, abs_tol=1e-9)
            floor = 1 / 30 - 1e-12 if isinstance(balancer, CoBa) else 0
            assert min(weights.values()) >= floor


@given(
    st.lists(st.tuples(losses, losses, losses), min_size=3, max_size=8),
    st.permutations(list(SIZES)),
)
def test_permuting_tasks_permutes_weights(
    history: list[tuple[float, ...]], order: list[str]
) -> None:
    straight = every_kind(SIZES)[2:]
    permuted = every_kind({task: SIZES[task] for task in order})[2:]
    for one, other in zip(straight, permuted, strict=True):
        for step, row in enumerate(history):
            seen = dict(zip(SIZES, row, strict=True))
            one.observe(step, seen)
            other.observe(step, seen)
        assert one.weights(8) == pytest.approx(other.weights(8), abs=1e-9)


def test_slope_is_least_squares_and_zero_without_two_points() -> None:
    points = [(0, 3.0), (1, 2.5), (4, 2.4), (9, 0.5)]
    expected = np.polyfit([p[0] for p in points], [p[1] for p in points], 1)[0]
    assert slope(points) == pytest.approx(expected)
    assert slope([]) == slope([(3, 1.0)]) == 0


def test_size_inverse_and_static() -> None:
    weights = SizeInverse({"a": 100, "b": 50}).weights(0)
    assert weights == pytest.approx({"a": 1 / 3, "b": 2 / 3})
    assert SizeInverse({"a": 100, "b": 25}, power=0.5).weights(0)["b"] == pytest.approx(2 / 3)
    assert Static({"a": 1, "b": 1}, {"a": 3, "b": 1}).weights(9) == {"a": 0.75, "b": 0.25}


def test_selfpaced_prefers_what_falls_and_is_uniform_when_nothing_moves() -> None:
    balancer = SelfPaced({"falling": 1, "flat": 1})
    assert balancer.weights(0) == {"falling": 0.5, "flat": 0.5}
    for step in range(5):
        balancer.observe(step, {"falling": 5.0 - step, "flat": 1.0})
    assert balancer.weights(5)["falling"] > 0.99


def test_coba_favours_the_slow_task_while_all_converge() -> None:
    fast_and_slow = np.array([[-1.0, -0.1]] * 4)
    weights = coba_weights(fast_and_slow, divergence=1.0)
    assert weights[1] > weights[0]
    assert coba_weights(np.zeros((3, 4)), 0.5) == pytest.approx([0.25] * 4)


def test_coba_holds_back_the_rising_task_when_something_diverges() -> None:
    # Task 0 falls as before; task 1 fell and now rises: only its own past tells.
    slopes = np.array([[-0.5, -0.5], [-0.5, -0.5], [-0.5, 0.5]])
    absolute = coba_weights(slopes, divergence=0.0)
    assert absolute[1] < absolute[0]
    assert coba_weights(slopes, divergence=1.0)[1] > absolute[1]


def test_divergence_factor_is_one_on_steady_descent_and_small_on_ascent() -> None:
    assert divergence_factor(np.full(6, -0.3)) == pytest.approx(1)
    assert divergence_factor(np.array([-0.3, -0.3, -0.3, 0.3])) < 0.01
    assert divergence_factor(np.zeros(3)) == pytest.approx(1)


def test_coba_formula_on_one_example() -> None:
    """Against the equations, written out for two tasks and two steps."""
    (a, b), (c, d) = slopes = (-0.4, -0.1), (-0.2, 0.1)
    relative = np.exp([2 * c / 0.3, 2 * d / 0.3])
    relative /= relative.sum()
    own = [np.exp([-2 * x / (abs(x) + abs(y)), -2 * y / (abs(x) + abs(y))]) for x, y in slopes]
    assert len(own) == 2
    last_0 = -2 * c / (abs(a) + abs(c))
    last_1 = -2 * d / (abs(b) + abs(d))
    absolute = np.exp([last_0, last_1]) / np.exp([last_0, last_1]).sum()
    expected = np.exp(2 * (0.3 * relative + 0.7 * absolute))
    expected /= expected.sum()
    assert coba_weights(np.array(slopes), 0.3) == pytest.approx(expected)


def test_coba_is_uniform_in_warmup_and_compares_with_step_zero() -> None:
    balancer = CoBa(SIZES, warmup=3)
    with pytest.raises(DataError, match="step 0"):
        balancer.observe(1, dict.fromkeys(SIZES, 1.0))
    with pytest.raises(DataError, match="'add'"):
        balancer.observe(0, {"copy": 1.0, "reverse": 1.0})
    scale = {"copy": 10.0, "reverse": 1.0, "add": 0.1}
    for step in range(6):
        balancer.observe(step, {task: x * (1 - step / 10) for task, x in scale.items()})
        assert step >= 3 or balancer.weights(step) == balancer.uniform()
    assert balancer.weights(6) == pytest.approx(balancer.uniform())  # same relative progress


@pytest.mark.parametrize("kind", range(5))
def test_resume_keeps_the_weights_to_the_bit(kind: int) -> None:
    generator = np.random.default_rng(kind)
    rows = [dict(zip(SIZES, generator.uniform(0.1, 3, 3), strict=True)) for _ in range(14)]
    for row in rows[3::4]:
        row.pop("add")  # absent from that validation batch
    whole, first = every_kind(SIZES)[kind], every_kind(SIZES)[kind]
    sequence = []
    for step, row in enumerate(rows):
        whole.observe(step, row)
        sequence.append(whole.weights(step))
    for step, row in enumerate(rows[:7]):
        first.observe(step, row)
    resumed = every_kind(dict(reversed(SIZES.items())) if kind > 1 else SIZES)[kind]
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step, row in enumerate(rows[7:], 7):
        resumed.observe(step, row)
        got = resumed.weights(step)
        assert got == pytest.approx(sequence[step], abs=1e-12)
        assert kind > 1 or got == sequence[step]


def test_a_checkpoint_of_other_tasks_is_refused() -> None:
    with pytest.raises(CheckpointError, match="'b'"):
        SelfPaced({"a": 1}).load_state_dict(SelfPaced({"b": 1}).state_dict())


def test_a_loss_that_is_not_finite_is_skipped_and_the_third_stops(
    caplog: pytest.LogCaptureFixture,
) -> None:
    balancer = SelfPaced({"a": 1, "b": 1})
    with caplog.at_level(logging.WARNING):
        balancer.observe(0, {"a": math.nan, "b": 1.0})
        balancer.observe(1, {"a": math.inf, "b": 0.9})
        balancer.observe(2, {"a": 1.0, "b": 0.8})
    assert "task 'a' is nan" in caplog.text
    assert balancer.slopes()[0] == 0
    for step in (3, 4):
        balancer.observe(step, {"a": math.nan})
    with pytest.raises(Diverged, match="'a' was nan 3 times"):
        balancer.observe(5, {"a": math.nan})


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="names of the tasks"):
        Uniform({})
    with pytest.raises(ConfigurationError, match="'b'"):
        Static({"a": 1}, {"b": 1.0})
    with pytest.raises(ConfigurationError, match="above 0"):
        Static({"a": 1}, {"a": 0.0})
    with pytest.raises(DataError, match="'a' has no training examples"):
        SizeInverse({"a": 0})
    with pytest.raises(ConfigurationError, match="window"):
        SelfPaced({"a": 1}, window=1)
    with pytest.raises(DataError, match="no task named 'c'"):
        SelfPaced({"a": 1}).observe(0, {"c": 1.0})


def test_all_kinds_are_found_by_name() -> None:
    assert set(registry.available("balancers")) == {
        "uniform",
        "static",
        "size-inverse",
        "selfpaced",
        "coba",
    }


class Evaluations:
    """Stands for the trainer: notes what it was asked to evaluate."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def evaluate(self, items: Any) -> dict[str, float]:
        self.asked.append([item[0].source for item in items])
        return {"loss": 9.0} | {f"loss/{item[0].task}": 1.0 for item in items}


class Report:
    def __init__(self, step: int) -> None:
        self.step = step


def valid(task: str, source: str) -> tuple[Example]:
    return (Example([1, 2], [False, True], task, source),)


def test_the_hook_cycles_through_the_validation_items_in_order() -> None:
    items = [valid("a", "0"), valid("b", "1"), valid("a", "2")]
    trainer: Any = Evaluations()
    hook = BalanceHook(SelfPaced({"a": 1, "b": 1}), items, interval=2, batch=2)
    for step in range(1, 5):
        hook.before_step(trainer)
        report: Any = Report(step)
        hook.after_step(trainer, report)
    assert trainer.asked == [["0", "1", "2"], ["0", "1"], ["2", "0"]]

    resumed = BalanceHook(SelfPaced({"a": 1, "b": 1}), items, interval=2, batch=2)
    resumed.load_state_dict(json.loads(json.dumps(hook.state_dict())))
    again: Any = Evaluations()
    resumed.before_step(again)
    last: Any = Report(6)
    resumed.after_step(again, last)
    assert again.asked == [["1", "2"]]


def test_the_hook_refuses_tasks_without_validation_rows() -> None:
    with pytest.raises(DataError, match="no validation rows of: 'b'"):
        BalanceHook(CoBa({"a": 1, "b": 1}), [valid("a", "0")])
    with pytest.raises(DataError, match="no validation rows of: 'a'; have none"):
        BalanceHook(CoBa({"a": 1}), [])
    with pytest.raises(ConfigurationError, match="at least 1"):
        BalanceHook(CoBa({"a": 1}), [valid("a", "0")], interval=0)
