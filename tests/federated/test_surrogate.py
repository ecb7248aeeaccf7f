"""Plans of schedules against what the schedules do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigurationError
from anabranch.federated import (
    Buffered,
    Client,
    Deadline,
    DeviceProfile,
    Federation,
    Simulation,
    Site,
    Sync,
    Uniform,
)
from anabranch.federated.scheduling.compass import Compass
from anabranch.federated.scheduling.fixed import FixedWindows
from anabranch.federated.strategies.fedfix import FedFix
from anabranch.federated.surrogate import arrivals, fixed_windows, played, rounds

SECONDS = {"a": 1.0, "b": 2.5, "c": 4.0}
P = {"a": 0.5, "b": 0.3, "c": 0.2}


class Nothing(Client):
    """A unit of work that changes nothing."""

    def run(self, ctx, kind, payload):
        ctx.spend(1)
        return {"x": torch.zeros(1)}, len(ctx.data)


def happened(schedule, weights):
    """Shares of the clients, mean age of an update, and versions a second, of a real run."""
    sites = [
        Site(name, [0] * round(100 * P[name]), DeviceProfile(taken))
        for name, taken in SECONDS.items()
    ]
    server = FedFix(weights=weights).server({"x": torch.zeros(1)})
    weighed, ages = dict.fromkeys(SECONDS, 0.0), []
    fold, commit = server.fold, server.commit

    def spy_fold(acc, update):
        ages.append(update.staleness)
        return fold(acc, update)

    def spy_commit(acc):
        for name in acc["clients"]:
            weighed[name] += server.weight(name, acc["making"])
        return commit(acc)

    server.fold, server.commit = spy_fold, spy_commit
    made = Federation(server, Nothing(), schedule, Simulation(sites))
    made.run()
    total = sum(weighed.values())
    shares = {name: weight / total for name, weight in weighed.items()}
    return shares, sum(ages) / len(ages), made.coordinator.version / made.coordinator.now()


@pytest.mark.parametrize("weights", ["equal", "counting"])
@pytest.mark.parametrize("size", [1, 0])
def test_plans_are_what_a_run_does(weights, size):
    if size:
        plan, schedule = arrivals(SECONDS, P, size, weights), Buffered(600, size)
    else:
        plan, schedule = fixed_windows(SECONDS, 1.5, P, weights), FixedWindows(600, 1.5)
    shares, age, versions = happened(schedule, weights)
    for name in SECONDS:
        assert shares[name] == pytest.approx(plan.importance[name], rel=0.01)
    assert age == pytest.approx(plan.staleness, rel=0.01)
    assert versions == pytest.approx(plan.versions_per_second, rel=0.01)


def test_a_round_is_as_long_as_the_slowest_task():
    plan = rounds(SECONDS, P)
    assert plan.importance == pytest.approx(P) and plan.bias == 0
    shares, age, versions = happened(Sync(5), "equal")
    assert shares == pytest.approx(P) and age == plan.staleness == 0
    assert versions == pytest.approx(plan.versions_per_second)


def test_the_papers_table_for_equal_weights():
    found = arrivals(SECONDS, weights="equal").importance
    total = sum(1 / taken for taken in SECONDS.values())
    assert found == pytest.approx({n: 1 / taken / total for n, taken in SECONDS.items()})
    found = fixed_windows({"fast": 1.0, "slow": 7.0}, 2.0, weights="equal")
    assert found.importance == pytest.approx({"fast": 0.8, "slow": 0.2})
    assert found.bias == pytest.approx(0.3)


@settings(deadline=None)
@given(
    st.dictionaries(st.text(max_size=3), st.floats(0.1, 50), min_size=1, max_size=6),
    st.floats(0.05, 60),
    st.integers(1, 5),
)
def test_counting_is_never_biased_and_a_long_window_is_a_round(seconds, window, size):
    assert fixed_windows(seconds, window).bias == pytest.approx(0, abs=1e-9)
    assert arrivals(seconds, size=size).bias == pytest.approx(0, abs=1e-9)
    slowest = max(seconds.values())
    long = fixed_windows(seconds, slowest, weights="equal")
    assert long.importance == rounds(seconds).importance
    assert long.versions_per_second == rounds(seconds).versions_per_second
    heaviest = max(fixed_windows(seconds, window).weights.values())
    assert heaviest * len(seconds) >= slowest / window - 1e-9


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: rounds({}), "at least one client"),
        (lambda: rounds({"a": 0.0}), "a: a task takes"),
        (lambda: rounds({"a": 1.0}, {"b": 1.0}), "not a, b"),
        (lambda: rounds({"a": 1.0}, {"a": -1.0}), "at least 0, not -1"),
        (lambda: rounds({"a": 1.0}, {"a": 0.0}), "above 0"),
        (lambda: arrivals({"a": 1.0}, size=0), "at least 1 update"),
        (lambda: arrivals({"a": 1.0}, weights="fair"), "'fair'"),
        (lambda: fixed_windows({"a": 1.0}, 0.0), "above 0 seconds"),
    ],
)
def test_what_cannot_be_planned(make, says):
    with pytest.raises(ConfigurationError, match=says):
        make()


DEVICES = {name: DeviceProfile(taken / 10) for name, taken in SECONDS.items()}
STEPS = dict.fromkeys(SECONDS, 10)


@pytest.mark.parametrize("weights", ["equal", "counting"])
def test_playing_a_schedule_gives_what_follows_from_its_arithmetic(weights):
    for schedule, plan in (
        (Buffered(300, 2), arrivals(SECONDS, P, 2, weights)),
        (FixedWindows(300, 1.5), fixed_windows(SECONDS, 1.5, P, weights)),
        (Sync(20), rounds(SECONDS, P)),
    ):
        found = played(schedule, DEVICES, STEPS, P, weights)
        assert found.importance == pytest.approx(plan.importance, rel=0.03)
        assert found.arrivals == pytest.approx(plan.arrivals, rel=0.03)
        assert found.staleness == pytest.approx(plan.staleness, rel=0.03, abs=1e-9)
        assert found.versions_per_second == pytest.approx(plan.versions_per_second, rel=0.03)


def test_sampled_rounds_last_as_long_as_the_slowest_of_them():
    slowest = {1: (1.0 + 2.5 + 4.0) / 3, 2: (2.5 + 4.0 + 4.0) / 3, 3: 4.0}
    for sample, taken in slowest.items():
        plan = rounds(SECONDS, P, sample)
        assert 1 / plan.versions_per_second == pytest.approx(taken)
        assert plan.arrivals == pytest.approx(dict.fromkeys(P, sample / 3))
        assert plan.importance == pytest.approx(P)
    found = played(Sync(600, Uniform(2)), DEVICES, STEPS, P, "equal")
    assert 1 / found.versions_per_second == pytest.approx(slowest[2], rel=0.05)


def test_who_misses_every_deadline_counts_for_nothing():
    found = played(Deadline(20, seconds=3.0), DEVICES, STEPS, P, "counting")
    assert found.importance == pytest.approx({"a": 0.625, "b": 0.375, "c": 0.0})
    assert found.arrivals["c"] == 0 and found.bias == pytest.approx(0.2)
    assert found.versions_per_second == pytest.approx(1 / 3)


def test_groups_of_devices_within_the_ratio_of_steps_hold_everyone():
    found = played(Compass(60, max_steps=50, min_steps=10), DEVICES, STEPS, P, "equal")
    assert found.arrivals == pytest.approx(dict.fromkeys(P, 1.0))
    assert found.importance == pytest.approx(P) and found.bias == pytest.approx(0)


def test_what_cannot_be_played():
    with pytest.raises(ConfigurationError, match="4 versions"):
        played(Sync(2), DEVICES, STEPS)
    with pytest.raises(ConfigurationError, match="no time"):
        played(Sync(9), {"a": DeviceProfile()}, {"a": 1})
    with pytest.raises(ConfigurationError, match="from 1 to the 3"):
        rounds(SECONDS, P, 4)
