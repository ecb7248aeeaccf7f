"""Ferret: updates as inner products."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from anabranch.errors import ConfigurationError
from anabranch.evaluation.testbeds import digits
from anabranch.federated import (
    Buffered,
    DeviceProfile,
    Federation,
    Simulation,
    Site,
    Sync,
    Uniform,
)
from anabranch.federated.errors import EmptyRound, FederationError, PayloadError
from anabranch.federated.random_projection import LARGEST_BLOCK, RandomProjection, message_of
from anabranch.federated.randomness import derive_seed
from anabranch.federated.seeded_directions import truncated
from anabranch.federated.shared import shared_tensors
from anabranch.federated.strategies import FedAvg
from anabranch.federated.strategies.ferret import _CONTRIBUTION, Ferret, moved, step_of
from tests.federated.helpers import Tamper

SHAPES = {"a": (12, 10), "b": (10,), "c": (), "d": (60,), "e": (3,)}


def change(scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return {n: scale * torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}


def sites(clients=3, examples=30):
    return [
        Site(f"c{i}", list(range(examples * i, examples * (i + 1))), DeviceProfile(1.0))
        for i in range(clients)
    ]


def simulate(strategy, places=None, steps=3, rounds=3, **options):
    local = digits.local(batch=8, steps=steps)
    places = sites() if places is None else places
    return strategy.simulate(digits.perceptron(), local, places, rounds=rounds, **options)


def bits(tensors):
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


# Inner products


def test_blocks_hold_every_value_once():
    # The median is 30 values, so that tensors share blocks of up to 27.
    sizes = {"a": 100, "b": 30, "c": 5, "d": 40, "e": 2, "f": 20, "g": 10, "h": 100, "i": 50}
    blocks = RandomProjection({n: torch.zeros(s) for n, s in sizes.items()}, 8).blocks
    packed = [[piece.name for piece in block] for block in blocks]
    assert packed == [["a"], ["b"], ["c"], ["d"], ["e", "f"], ["g"], ["h"], ["i"]]
    assert all((p.start, p.stop) == (0, sizes[p.name]) for block in blocks for p in block)


def test_giant_tensors_are_cut():
    tensors = {"w": torch.empty(LARGEST_BLOCK + 7, device="meta"), "v": torch.empty(5)}
    blocks = RandomProjection(tensors, 8).blocks
    spans = [(p.name, p.start, p.stop) for block in blocks for p in block]
    assert spans == [
        ("v", 0, 5),
        ("w", 0, LARGEST_BLOCK),
        ("w", LARGEST_BLOCK, LARGEST_BLOCK + 7),
    ]


def test_products_and_estimate_by_hand():
    projection, delta = RandomProjection(change(), 16), change()
    message = projection.encode(delta, 5)
    told = projection.read(message)
    estimate = projection.decode(message, 5)
    largest = max(float(bits({p.name: delta[p.name] for p in b}).norm()) for b in projection.blocks)
    for index, block in enumerate(projection.blocks):
        vector = torch.cat([delta[p.name].reshape(-1) for p in block])
        count = max(2, int(float(vector.norm()) / largest * 16))
        rows = torch.cat(list(truncated(5, index, count, len(vector))))
        assert torch.allclose(told[index], rows @ vector / count, atol=1e-6)
        rebuilt = torch.cat([estimate[p.name].reshape(-1) for p in block])
        assert torch.allclose(rebuilt, rows.T @ rows @ vector / count, atol=1e-5)
    assert len(message) == 2 * len(projection.blocks) + 4 * sum(map(len, told))


def test_the_estimate_is_unbiased():
    projection, delta = RandomProjection(change(), 8), change()
    found = torch.stack(
        [bits(projection.decode(projection.encode(delta, seed), seed)) for seed in range(2000)]
    ).double()
    error = found.std(0) / 2000**0.5
    apart = (found.mean(0) - bits(delta)).abs() / error
    # 194 values: the largest of them stays within 4.5 standard errors.
    assert float(apart.max()) < 4.5 and float(apart.square().mean()) == pytest.approx(1, abs=0.4)


def test_as_many_orthogonal_directions_as_values_tell_everything(monkeypatch):
    def orthogonal(seed, block, rows, width):
        drawn = np.random.default_rng([seed, block]).normal(size=(width, width))
        yield torch.from_numpy(np.linalg.qr(drawn)[0] * width**0.5).float()[:rows]

    monkeypatch.setattr("anabranch.federated.random_projection.truncated", orthogonal)
    values = torch.randn(7, 3)
    delta = {"a": values, "b": -values}  # two blocks of one length, which get all k
    projection = RandomProjection(delta, 21)
    message = projection.encode(delta, 4)
    assert len(message) == 2 * 2 + 4 * 2 * 21
    assert torch.allclose(bits(projection.decode(message, 4)), bits(delta), atol=1e-5)


def test_half_precision_models_are_rounded_once_from_the_sum():
    start = {name: t.to(torch.bfloat16) for name, t in change().items()}
    projection = RandomProjection(start, 8)
    parts = [(seed, 0.5, projection.encode(change(1e-3 * seed), seed)) for seed in (1, 2, 3)]
    release = b"".join(_CONTRIBUTION.pack(s, f, len(m)) + m for s, f, m in parts)
    after = moved(start, step_of(release, projection))
    for name, found in after.items():
        wanted = start[name].double()
        for seed, factor, message in parts:
            wanted = wanted + factor * projection.decode(message, seed)[name].double()
        assert found.dtype == torch.bfloat16 and torch.equal(found, wanted.to(torch.bfloat16))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_changes_that_are_not_finite(bad):
    delta = change()
    delta["b"][3] = bad
    with pytest.raises(FederationError, match="lower the local rate"):
        RandomProjection(change(), 8).encode(delta, 1)


def test_messages_that_are_damaged():
    projection = RandomProjection(change(), 8)
    message = projection.encode(change(), 1)
    counts = np.frombuffer(message[:10], "<u2").copy()
    nan = message[:-4] + np.array([np.nan], "<f4").tobytes()
    for damaged, says in (
        (message[:-1], "are not the inner products"),
        (b"", "are not the inner products"),
        (nan, "NaN"),
        (np.where(counts == 8, 9, counts).astype("<u2").tobytes() + message[10:] + b"0000", "2 to"),
    ):
        with pytest.raises(PayloadError, match=says):
            projection.decode(damaged, 1)


def test_nothing_moved_is_nothing():
    projection = RandomProjection(change(), 8)
    estimate = projection.decode(projection.encode(change(0.0), 1), 1)
    assert not any(t.any() for t in estimate.values())


def test_a_pool_has_the_same_directions_for_all_and_messages_choose():
    delta = change()
    projection = RandomProjection(delta, 8, pool=3)
    for seed in (1, 2):
        message = projection.encode(delta, seed)
        told = projection.read(message)
        estimate = projection.decode(message, seed)
        for index, block in enumerate(projection.blocks):
            vector = torch.cat([delta[p.name].reshape(-1) for p in block])
            chosen = projection.chosen(seed, index, len(told[index]))
            assert len(set(chosen)) == len(chosen) and set(chosen) <= set(range(8))
            rows = torch.cat(
                [next(truncated(derive_seed("pool", 3, j), index, 1, len(vector))) for j in chosen]
            )
            assert torch.allclose(told[index], rows @ vector / len(chosen), atol=1e-6)
            rebuilt = torch.cat([estimate[p.name].reshape(-1) for p in block])
            assert torch.allclose(rebuilt, rows.T @ told[index], atol=1e-5)
    choices = {tuple(projection.chosen(seed, 0, 4)) for seed in range(50)}
    assert len(choices) > 25
    assert projection.chosen(1, 0, 8) == list(range(8))


def test_the_sum_over_a_pool_is_the_sum_of_the_estimates():
    projection, parts = RandomProjection(change(), 8, pool=3), []
    wanted = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for seed, factor in ((1, 0.25), (2, 0.75)):
        message = projection.encode(change(seed), seed)
        parts.append((seed, factor, message))
        for name, estimate in projection.decode(message, seed).items():
            wanted[name] += factor * estimate
    summed = message_of(projection.pooled(parts).float())
    assert len(summed) == len(projection.blocks) * (2 + 4 * 8)
    found = projection.decode(summed, 99)  # with all directions, any seed chooses the same
    assert torch.allclose(bits(found), bits(wanted), atol=1e-5)


def test_clipping_cuts_what_is_longer_and_counts_it():
    projection = RandomProjection(change(), 16)
    message = projection.encode(change(), 5)
    told = projection.read(message)
    widths = [sum(p.stop - p.start for p in block) for block in projection.blocks]
    lengths = torch.cat([c.abs() * n**0.5 for c, n in zip(told, widths, strict=True)])
    bound = float(lengths.median())
    clipped, cut = projection.clip(message, bound)
    after = projection.read(clipped)
    assert cut == int((lengths > bound).sum()) > 0
    for before, now, n in zip(told, after, widths, strict=True):
        assert torch.allclose(now.abs(), before.abs().clamp(max=bound * n**-0.5))
        assert torch.equal(now.sign(), before.sign())
    assert projection.clip(message, float(lengths.max()) * 1.001) == (message, 0)


# The run


class Whole(RandomProjection):
    """Sends the change itself, to compare the rest of the method with FedAvg."""

    def encode(self, change, seed):
        return bits(change).numpy().tobytes()

    def read(self, message):
        return []

    def decode(self, message, seed):
        values = torch.frombuffer(bytearray(message), dtype=torch.float32)
        parts = values.split([math.prod(shape) for shape in self.shapes.values()])
        return {
            n: part.reshape(shape)
            for (n, shape), part in zip(self.shapes.items(), parts, strict=True)
        }


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_with_whole_updates_it_is_fedavg(monkeypatch, weighting):
    monkeypatch.setattr("anabranch.federated.strategies.ferret.RandomProjection", Whole)
    places = [Site("a", list(range(40))), Site("b", list(range(40, 60))), Site("empty", [])]
    ferret = simulate(Ferret(weighting=weighting, clip=None), places)
    average = simulate(FedAvg(weighting=weighting), places)
    ferret.run(), average.run()
    assert torch.allclose(bits(ferret.server.tensors), bits(average.server.tensors), atol=1e-6)


def test_clients_follow_by_inner_products_and_have_the_servers_model():
    federation = simulate(Ferret(16), rounds=5)
    versions = []
    federation.coordinator.watch = lambda made: versions.append(bits(made.server.tensors)) or {}
    result = federation.run()
    model = 4 * 4810
    assert result.ledger.total(direction="up").payload < result.ledger.total().messages / 2 * 600
    assert result.ledger.total(direction="down").payload < 15 * model / 4
    for name in ("c0", "c1", "c2"):
        state = federation.runtime.node(name).state
        assert state["version"] == 4
        assert torch.equal(bits(state["tensors"]), versions[3])


def test_clients_that_miss_rounds_and_late_ones_catch_up():
    places = sites(5)
    places[4] = dataclasses.replace(places[4], joins=8.0)
    for options in ({"schedule": Sync(9, Uniform(2))}, {"schedule": Buffered(9, 2)}):
        federation = simulate(Ferret(16), places, **options)
        versions = [bits(shared_tensors(digits.perceptron()))]
        federation.coordinator.watch = lambda made, seen=versions: (
            seen.append(bits(made.server.tensors)) or {}
        )
        federation.run()
        for place in places:
            state = federation.runtime.node(place.name).state
            assert torch.equal(bits(state["tensors"]), versions[state["version"]])


def test_momentum_is_the_recursion_along_the_pool():
    federation = simulate(Ferret(16, momentum=0.5, clip=None), rounds=4)
    told, versions = [], [bits(shared_tensors(digits.perceptron()))]
    server = federation.server
    commit = server.commit

    def listen(acc):
        told.append([(seed, weight, products) for seed, weight, _, products in acc])
        figures = commit(acc)
        versions.append(bits(server.tensors))
        return figures

    server.commit = listen
    federation.run()
    projection = server.projection
    assert projection.pool is not None
    velocity = torch.zeros_like(versions[0])
    for step, round_ in enumerate(told):
        total = sum(weight for _, weight, _ in round_)
        mean = sum(
            weight / total * bits(projection.decode(products, seed))
            for seed, weight, products in round_
        )
        velocity = mean + 0.5 * velocity
        assert torch.allclose(versions[step + 1] - versions[step], velocity, atol=1e-5)


def test_with_a_pool_the_sum_over_clients_goes_down():
    def down(clients):
        federation = simulate(Ferret(16, momentum=0.5), sites(clients), rounds=3)
        per_client = federation.run().ledger.total(direction="down", version=2).payload / clients
        for name in (f"c{i}" for i in range(clients)):
            assert federation.runtime.node(name).state["version"] == 2
        states = [federation.runtime.node(f"c{i}").state["tensors"] for i in range(clients)]
        assert all(torch.equal(bits(states[0]), bits(other)) for other in states)
        return per_client

    assert down(2) == down(6)


def test_what_is_clipped_is_counted_and_bounded():
    start = bits(shared_tensors(digits.perceptron()))
    free, tight = (
        simulate(Ferret(16, clip=None), rounds=1),
        simulate(Ferret(16, clip=1e-3), rounds=1),
    )
    loose = simulate(Ferret(16, clip=1e6), rounds=1)
    assert "clipped" not in free.run().history[0]
    assert loose.run().history[0]["clipped"] == 0
    figures = tight.run().history[0]
    assert torch.equal(bits(free.server.tensors), bits(loose.server.tensors))
    moved = float((bits(tight.server.tensors) - start).norm())
    assert 0 < figures["clipped"] <= figures["products"]
    # No more than the bound for each direction; lengths of directions are within 2 of sqrt(n).
    assert 0 < moved <= 2 * 1e-3 * figures["products"]
    assert moved < float((bits(free.server.tensors) - start).norm())


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_the_rate_falls(decay):
    ferret = Ferret(server_lr=4.0, decay=decay, decay_rounds=10, final_server_lr=1.0)
    rates = [ferret.rate(version) for version in range(13)]
    assert rates[0] == 4 and rates[10:] == [1, 1, 1]
    assert rates[5] == pytest.approx(2.5) and rates == sorted(rates, reverse=True)
    halved = simulate(Ferret(16, decay=decay, decay_rounds=2), rounds=3)
    versions = []
    halved.coordinator.watch = lambda made: versions.append(bits(made.server.tensors)) or {}
    halved.run()
    whole = simulate(Ferret(16), rounds=1)
    whole.run()
    start = bits(shared_tensors(digits.perceptron()))
    assert torch.equal(versions[0], bits(whole.server.tensors))
    assert not torch.equal(versions[0], versions[1]) and not torch.equal(versions[0], start)
    assert torch.equal(versions[1], versions[2])


def test_the_model_is_sent_where_that_is_less():
    federation = simulate(Ferret(2000), rounds=3)
    result = federation.run()
    assert not federation.server.releases and federation.server.oldest == 3
    down = result.ledger.total(direction="down", version=2)
    assert 3 * 4 * 4810 <= down.payload <= 3 * (4 * 4810 + 256)


def test_a_site_that_lost_its_state_begins_again_from_the_base():
    federation = simulate(Ferret(16), rounds=6)

    def forget(task, reply):
        state = federation.runtime.node("c1")._personal["state"]
        state.update(tensors=shared_tensors(digits.perceptron()), version=0)
        return [reply]

    federation.runtime.faults = Tamper({("c1", 2): forget})
    federation.run()
    one, other = (federation.runtime.node(name).state for name in ("c0", "c1"))
    assert torch.equal(bits(one["tensors"]), bits(other["tensors"]))


def test_bad_replies_and_other_bases():
    federation = simulate(Ferret(16), rounds=1)
    federation.runtime.faults = Tamper(
        {("c1", 1): lambda task, reply: [dataclasses.replace(reply, body=b"abc")]}
    )
    assert federation.run().incidents.count("malformed", "c1") == 1
    federation = simulate(Ferret(16), rounds=1)
    federation.server.base += 1
    with pytest.raises(EmptyRound, match="BaseModelMismatch"):
        federation.run()


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("k", [8, 32])
def test_a_site_that_would_project_otherwise_does_not_take_part(k, momentum):
    model, ours = digits.perceptron(), Ferret(16, momentum=momentum)
    client = Ferret(k, momentum=momentum).client(digits.local(batch=8, steps=3))
    runtime = Simulation(sites(1), model)
    federation = Federation(ours.begin(model), client, Sync(1), runtime, patience=0)
    says = rf"BlockPlanMismatch: c0 tells changes by .*k = {k}, .*; the run has .*k = 16,"
    with pytest.raises(EmptyRound, match=says):
        federation.run()


def test_other_blocks_and_directions_have_other_layouts(monkeypatch):
    layouts = {
        RandomProjection(tensors, k).layout
        for k in (8, 9)
        for tensors in (change(), {**change(), "c": torch.zeros(2)}, {"f": torch.zeros(194)})
    }
    assert len(layouts) == 6
    monkeypatch.setattr("anabranch.federated.random_projection.ENGINE", 2)
    assert RandomProjection(change(), 8).layout not in layouts


def test_a_site_whose_training_went_astray_fails_and_others_go_on():
    federation = simulate(Ferret(16), rounds=1)
    train = federation.client.local.run

    class Astray:
        def run(self, ctx, start):
            result = train(ctx, start)
            if ctx.name == "c1":
                result.tensors["0.bias"][0] = math.nan
            return result

    federation.client.local = Astray()
    result = federation.run()
    (incident,) = result.incidents
    assert (incident.what, incident.client) == ("failed", "c1")
    assert "holds NaN or infinity; lower the local rate" in incident.message


def test_nobody_with_data():
    with pytest.raises(EmptyRound, match="no client sent an update"):
        simulate(Ferret(), [Site("a", [])], patience=0).run()


@pytest.mark.parametrize(
    "options",
    [
        {"k": 1},
        {"k": 65_536},
        {"k": 2.5},
        {"k": "16"},
        {"server_lr": 0.0},
        {"weighting": "loss"},
        {"staleness": -1.0},
        {"momentum": 1.0},
        {"clip": 0.0},
        {"decay": "step", "decay_rounds": 3},
        {"decay": "linear"},
        {"decay_rounds": 3},
        {"decay": "linear", "decay_rounds": 0},
        {"decay": "linear", "decay_rounds": 3, "final_server_lr": 2.0},
    ],
)
def test_options_that_cannot_work(options):
    with pytest.raises(ConfigurationError):
        Ferret(**options)
