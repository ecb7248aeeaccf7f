"""Plans of schedules against what the schedules do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigurationError
from anabranch.federated import Buffered, Client, DeviceProfile, Federation, Simulation, Site, Sync
from anabranch.federated.scheduling.fixed import FixedWindows
from anabranch.federated.strategies.fedfix import FedFix
from anabranch.federated.surrogate import arrivals, fixed_windows, rounds

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
