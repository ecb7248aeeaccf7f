"""Which node aggregates what: the published figures, and what every placement must keep."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigurationError
from anabranch.federated.aggregation.tree import plan_hierarchy
from anabranch.federated.scheduling.placement import (
    Ewma,
    best_fit,
    first_fit,
    measure_capacity,
    worst_fit,
)

FIVE = {f"n{i}": 20.0 for i in range(5)}
RULES = (best_fit, worst_fit, first_fit)


@pytest.mark.parametrize(("clients", "nodes"), [(20, 1), (60, 3), (100, 5)])
def test_best_fit_fills_as_few_nodes_as_there_can_be(clients, nodes):
    assert len(best_fit(FIVE, clients)) == nodes == len(first_fit(FIVE, clients))
    assert len(worst_fit(FIVE, clients)) == 5


def test_by_hand():
    room = {"a": 3.0, "b": 1.5, "c": 2.0}
    assert best_fit(room, 4) == {"a": 1, "b": 1, "c": 2}
    assert worst_fit(room, 4) == {"a": 2, "b": 1, "c": 1}
    assert first_fit(room, 4) == {"a": 3, "b": 1}
    assert best_fit(room, 0) == {}


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 30), min_size=1),
    st.integers(0, 60),
    st.sampled_from(RULES),
)
def test_everyone_is_placed_and_nobody_overloaded_while_there_is_room(room, clients, rule):
    placed = rule(room, clients)
    assert sum(placed.values()) == clients
    free = sum(int(each) for each in room.values())
    if clients <= free:
        assert all(count <= room[node] for node, count in placed.items())
    assert all(count > 0 for count in placed.values())


def test_too_many_clients_go_where_most_room_is_and_it_is_said(caplog):
    assert best_fit({"a": 1.0, "b": 2.0}, 5) == {"a": 2, "b": 3}
    assert "2 of 5 clients are more than the nodes have room for" in caplog.text


def test_smoothing():
    smooth = Ewma(0.7)
    assert smooth.add(10) == 10
    assert smooth.add(20) == pytest.approx(13)
    assert smooth.add(0) == pytest.approx(9.1)


def test_capacity_is_where_the_curve_bends():
    def seconds(rate):
        return 0.5 if rate <= 8 else 0.5 * rate / 8

    assert measure_capacity(seconds, [1, 2, 4, 8, 11, 16, 32]) == pytest.approx(11 * 0.6875)
    assert measure_capacity(lambda rate: 0.1, [1, 10]) == pytest.approx(1.0)


def test_a_plan_has_leaves_for_the_queue_a_middle_for_several_and_one_top():
    plan = plan_hierarchy({"a": 5, "b": 7.5, "c": 0, "d": 2}, fan_in=2)
    assert plan.leaves == {"a": 3, "b": 4, "d": 1}
    assert plan.middles == {"a", "b"} and plan.top == "b"
    assert plan.aggregators == 3 + 4 + 1 + 2 + 1
    assert plan_hierarchy({"a": 1}).aggregators == 1


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: best_fit({}, 3), "no node"),
        (lambda: best_fit(FIVE, -1), "at least 0"),
        (lambda: Ewma(1.0), "below 1"),
        (lambda: measure_capacity(lambda r: 1.0, [2, 1]), "rates rise"),
        (lambda: measure_capacity(lambda r: 0.0, [1, 2]), "no capacity follows"),
        (lambda: plan_hierarchy({"a": 3}, fan_in=1), "fan_in is at least 2"),
        (lambda: plan_hierarchy({"a": -1}), "numbers of updates"),
        (lambda: plan_hierarchy({"a": 0}), "no node expects"),
    ],
)
def test_what_cannot_be(call, says):
    with pytest.raises(ConfigurationError, match=says):
        call()
