"""FedAsync, FedBuff and FedFix: who counts for how much when nobody waits for everybody."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigurationError
from anabranch.evaluation.testbeds import digits
from anabranch.federated import (
    Buffered,
    Client,
    DeviceProfile,
    Federation,
    Simulation,
    Site,
    Sync,
    Tree,
    Uniform,
)
from anabranch.federated.errors import EmptyRound
from anabranch.federated.scheduling.fixed import FixedWindows
from anabranch.federated.server import ServerContext, Update
from anabranch.federated.strategies import FedAvg
from anabranch.federated.strategies.fedasync import FedAsync
from anabranch.federated.strategies.fedbuff import FedBuff
from anabranch.federated.strategies.fedfix import FedFix
from anabranch.federated.topologies import Star
from tests.federated.helpers import (
    Crash,
    Tamper,
    assert_killed_ends_the_same,
    crash_after,
    lost,
)

PARTS = [list(range(60)), list(range(60, 90)), list(range(90, 110)), list(range(110, 150))]


def digit_sites(seconds=(1.0, 2.0, 3.0, 4.0)):
    """A step takes a tenth of the seconds, and a task ten steps."""
    return [
        Site(f"c{i}", part, DeviceProfile(each / 10))
        for i, (part, each) in enumerate(zip(PARTS, seconds, strict=False))
    ]


def run(strategy, sites=None, rounds=3, **options):
    federation = strategy.simulate(
        digits.perceptron(), digits.local(), sites or digit_sites(), rounds, **options
    )
    federation.run()
    return federation


class Pulled(Client):
    """``steps`` exact gradient steps on (x - b)^2 / 2, with b the site's data; one unit each."""

    def __init__(self, rate: float, steps: int = 1) -> None:
        self.rate, self.steps = rate, steps

    def run(self, ctx, kind, payload):
        x = payload["x"]
        ctx.spend(1)
        return {"x": (x - ctx.data[0]) * ((1 - self.rate) ** self.steps - 1)}, len(ctx.data)


TARGETS, TAUS = (0.0, 1.0, 4.0), (1.0, 2.0, 4.0)


def limit(strategy, schedule, rate=0.04, taus=TAUS, targets=TARGETS):
    """Where quadratics of these targets end, on devices that take these times for a task; averaged
    over the last third of the versions.
    """
    sites = [
        Site(f"c{i}", [b], DeviceProfile(tau))
        for i, (b, tau) in enumerate(zip(targets, taus, strict=True))
    ]
    server = strategy.server({"x": torch.zeros(1, dtype=torch.float64)})
    seen = []
    Federation(
        server,
        Pulled(rate),
        schedule,
        Simulation(sites),
        watch=lambda _: seen.append(float(server.tensors["x"])),
    ).run()
    last = seen[-(len(seen) // 3) :]
    return sum(last) / len(last)


def between(shares, targets=TARGETS):
    return sum(p * b for p, b in zip(shares, targets, strict=True)) / sum(shares)


def test_a_window_as_long_as_the_slowest_task_is_fedavg():
    plain = run(FedAvg())
    for window in (4.0, 5.5):
        windows = run(FedFix(window=window))
        for name, tensor in plain.server.tensors.items():
            assert torch.allclose(windows.server.tensors[name], tensor, atol=1e-6)
        assert windows.coordinator.state.now == 3 * window
    uniform = run(FedFix(window=4.0, importance="uniform"))
    for name, tensor in run(FedAvg(weighting="uniform")).server.tensors.items():
        assert torch.allclose(uniform.server.tensors[name], tensor, atol=1e-6)


def test_version_n_is_made_at_exactly_n_windows():
    history = run(FedFix(window=0.7), rounds=9).coordinator.state.history
    # The first client is there after 1 s: nothing was there at the end of the first window.
    assert history[0]["seconds"] == 2 * 0.7
    assert all(any(row["seconds"] == n * 0.7 for n in range(99)) for row in history)


@pytest.mark.parametrize("window", [0.5, 3.0])
def test_counting_corrects_what_speed_distorts(window):
    wanted = between((1, 1, 1))
    assert limit(FedFix(), FixedWindows(500, window)) == pytest.approx(wanted, rel=0.02)
    # With equal weights a client counts by how often it is in a version.
    found = limit(FedFix(weights="equal"), FixedWindows(500, window))
    surrogate = between([1 / math.ceil(tau / window) for tau in TAUS])
    assert found == pytest.approx(surrogate, rel=0.02)
    assert abs(surrogate - wanted) > 0.1 * wanted


def test_asynchronous_averaging_is_biased_by_speed_and_counting_corrects_it():
    frequency = [1 / tau for tau in TAUS]
    wanted = between((1, 1, 1))
    assert limit(FedAsync(), Buffered(1400, 1)) < 0.85 * wanted
    equal = limit(FedFix(weights="equal"), Buffered(1400, 1))
    assert equal == pytest.approx(between(frequency), rel=0.03)
    assert limit(FedFix(), Buffered(1400, 1)) == pytest.approx(wanted, rel=0.03)


def test_counting_makes_fedbuff_unbiased_too():
    """Also where a fast client is in one version more than once."""
    taus = (0.4, 2.0, 4.0)
    wanted = between((1, 1, 1))
    assert limit(FedFix(), Buffered(900, 3), taus=taus) == pytest.approx(wanted, rel=0.03)
    assert limit(FedBuff(), Buffered(900, 3), taus=taus) < 0.6 * wanted


EIGHTHS = st.integers(1, 40).map(lambda n: n / 8)  # sums of these are exact


@settings(deadline=None, max_examples=15)
@given(taus=st.lists(EIGHTHS, min_size=1, max_size=6), window=EIGHTHS)
def test_counting_is_the_papers_formula_for_constant_times(taus, window):
    """d = p ceil(tau / window), and every difference is applied exactly once."""
    sites = [Site(f"c{i}", [0.0], DeviceProfile(tau)) for i, tau in enumerate(taus)]
    strategy = FedFix()
    server = strategy.server({"x": torch.zeros(1)})
    given_to: dict[str, list[float]] = {}
    weight = server.weight

    def spy(client, version):
        found = weight(client, version)
        given_to.setdefault(client, []).append(found)
        return found

    server.weight = spy
    federation = Federation(
        server, Pulled(0.1), FixedWindows(12, window), Simulation(sites), watch=lambda _: {}
    )
    result = federation.run()
    assert sum(map(len, given_to.values())) == result.ledger.total(direction="up").messages - len(
        {u.task for held in federation.coordinator.state.held.values() for u in held}
    )
    steps = [math.ceil(tau / window) for tau in taus]
    if 1 in steps:  # otherwise windows may be empty, and make no version
        for i, count in enumerate(steps):
            for weight_given in given_to.get(f"c{i}", []):
                assert weight_given == pytest.approx(count / len(taus))


def test_a_measured_window_is_a_little_more_than_the_median():
    federation = run(FedFix(), rounds=1)
    # Two of four have replied after 1 and 2 seconds.
    assert federation.coordinator.state.now == pytest.approx(1.05 * 2.0)
    longer = run(FedFix(), rounds=25)
    assert longer.coordinator.schedule.length == pytest.approx(1.05 * 2.0)
    assert longer.coordinator.schedule.windows <= 20


def test_weights_cap_at_max_staleness():
    server = FedFix(max_staleness=2, importance="uniform").server({"x": torch.zeros(1)})
    server.setup(ServerContext(0, {"a": 10, "b": 30, "empty": 0}, Star()))
    assert server.weight("a", 1) == 0.5
    assert server.weight("a", 2) == server.weight("a", 9) == 1.0
    assert server.weight("empty", 9) == 0.0
    by_examples = FedFix().server({"x": torch.zeros(1)})
    by_examples.setup(ServerContext(0, {"a": 10, "b": 30}, Star()))
    assert by_examples.weight("b", 3) == pytest.approx(3 * 0.75)


def test_a_commit_without_weight_changes_nothing():
    server = FedFix().server({"x": torch.ones(1)})
    server.setup(ServerContext(0, {"a": 0}, Star()))
    update = Update(1, "a", "train", 0, {"x": torch.ones(1)}, 0, 0, 1.0, 1.0, {})
    before = server.state_dict()
    with pytest.raises(EmptyRound):
        server.commit(server.fold(None, update))
    assert server.state_dict() == before == {"tensors": server.tensors, "included": {}}


def test_partial_sums_of_a_tree_are_the_star():
    options = {"schedule": Buffered(4, 3)}
    star = run(FedFix(), **options)
    tree = run(FedFix(), topology=Tree.balanced(["c0", "c1", "c2", "c3"], 2), **options)
    for name, tensor in star.server.tensors.items():
        assert torch.allclose(tree.server.tensors[name], tensor, atol=1e-7)


def test_failures_joins_and_leaves_do_not_stop_the_windows():
    sites = digit_sites()
    sites = [
        sites[0],
        Site("c1", PARTS[1], DeviceProfile(0.2), joins=2.5),
        Site("c2", PARTS[2], DeviceProfile(0.3), leaves=4.0),
        sites[3],
    ]
    federation = FedFix(window=1.0).simulate(digits.perceptron(), digits.local(), sites, 12)
    federation.runtime.faults = Tamper({("c0", 1): lost, ("c3", 2): lost})
    result = federation.run()
    assert result.version == 12
    assert federation.server.included.keys() == {"c0", "c1", "c2", "c3"}
    assert federation.server.importance("c2") == 0.0
    assert sum(federation.server.importance(c) for c in ("c0", "c1", "c3")) == pytest.approx(1)


def test_windows_end_when_nobody_is_left_and_begin_again():
    sites = [
        Site("a", PARTS[0], DeviceProfile(0.1), leaves=3.5),
        Site("b", PARTS[1], DeviceProfile(0.1), joins=10.25),
    ]
    for window in (1.0, None):
        federation = run(FedFix(window=window), sites, rounds=5)
        seconds = [row["seconds"] for row in federation.coordinator.state.history]
        assert len(seconds) == 5 and any(time > 10.25 for time in seconds)
        assert not any(3.5 + 1.05 < time < 11.25 for time in seconds)


def test_killed_after_any_input_it_ends_the_same(tmp_path):
    def make(store):
        return FedFix().simulate(
            digits.perceptron(), digits.local(steps=1), digit_sites(), 22, store=store
        )

    assert_killed_ends_the_same(make, tmp_path, (3, 50))


def test_who_joins_after_a_resume_counts(tmp_path):
    def make(store, sites):
        return FedFix(window=1.0).simulate(
            digits.perceptron(), digits.local(steps=1), sites, 8, store=store
        )

    with pytest.raises(Crash):
        make(crash_after(6)(tmp_path / "run"), digit_sites()[:2]).run()
    again = make(tmp_path / "run", digit_sites()[:3])
    again.resume()
    assert again.server.importance("c2") == pytest.approx(20 / 110)
    assert "c2" in again.server.included


def test_fedbuff_with_everyone_begins_with_a_round_of_fedavg():
    buffered = run(FedBuff(size=4), digit_sites((1.0, 1.0, 1.0, 1.0)), rounds=1)
    averaged = run(FedAvg(weighting="uniform"), rounds=1)
    for name, tensor in averaged.server.tensors.items():
        assert torch.equal(buffered.server.tensors[name], tensor)


def test_fedasync_by_hand():
    """Two clients; the slow one's reply is three versions late."""
    sites = [Site("a", [1.0], DeviceProfile(1.0)), Site("b", [-1.0], DeviceProfile(3.5))]
    strategy = FedAsync(alpha=0.8, staleness=0.5)
    server = strategy.server({"x": torch.zeros(1, dtype=torch.float64)})
    Federation(server, Pulled(0.5), strategy.schedule(4), Simulation(sites)).run()
    x = 0.0
    for _ in range(3):
        x += 0.8 * 0.5 * (1.0 - x)
    x += 0.8 * (1 + 3) ** -0.5 * 0.5 * (-1.0 - 0.0)
    assert float(server.tensors["x"]) == pytest.approx(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FedFix(window=0.0),
        lambda: FedFix(window=math.nan),
        lambda: FedFix(weights="time"),
        lambda: FedFix(importance="size"),
        lambda: FedFix(server_lr=0),
        lambda: FedFix(max_staleness=0),
        lambda: FixedWindows(0, 1.0),
        lambda: FixedWindows(1, -1.0),
        lambda: FixedWindows(1, math.inf),
        lambda: FedBuff(size=0),
        lambda: FedAsync(alpha=0.0),
        lambda: FedAsync(alpha=1.5),
        lambda: FedAsync(staleness=-1.0),
        lambda: FedFix().schedule(1, Uniform(2)),
        lambda: FedBuff().schedule(1, Uniform(2)),
    ],
)
def test_bad_options_are_named(make):
    with pytest.raises(ConfigurationError):
        make()


def test_with_a_barrier_it_is_fedavg():
    averaged, fixed = run(FedAvg()), run(FedFix(), schedule=Sync(3))
    for name, tensor in averaged.server.tensors.items():
        assert torch.allclose(fixed.server.tensors[name], tensor, atol=1e-6)
