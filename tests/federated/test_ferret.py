"""Ferret: updates as inner products."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from anabranch.errors import ConfigurationError
from anabranch.evaluation.testbeds import digits
from anabranch.federated import Buffered, DeviceProfile, Site, Sync, Uniform
from anabranch.federated.errors import EmptyRound, FederationError, PayloadError
from anabranch.federated.random_projection import LARGEST_BLOCK, RandomProjection
from anabranch.federated.seeded_directions import truncated
from anabranch.federated.shared import shared_tensors
from anabranch.federated.strategies import FedAvg
from anabranch.federated.strategies.ferret import Ferret
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


# The run


class Whole(RandomProjection):
    """Sends the change itself, to compare the rest of the method with FedAvg."""

    def encode(self, change, seed):
        return bits(change).numpy().tobytes()

    def read(self, message):
        return []

    def decode(self, message, seed):
        values = torch.frombuffer(bytearray(message), dtype=torch.float32)
        parts = values.split([math.prod(shape) for shape, _ in self.shapes.values()])
        return {
            n: part.reshape(shape)
            for (n, (shape, _)), part in zip(self.shapes.items(), parts, strict=True)
        }


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_with_whole_updates_it_is_fedavg(monkeypatch, weighting):
    monkeypatch.setattr("anabranch.federated.strategies.ferret.RandomProjection", Whole)
    places = [Site("a", list(range(40))), Site("b", list(range(40, 60))), Site("empty", [])]
    ferret = simulate(Ferret(weighting=weighting), places)
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


def test_the_model_is_sent_where_that_is_less():
    federation = simulate(Ferret(2000), rounds=3)
    result = federation.run()
    assert not federation.server.releases and federation.server.oldest == 3
    down = result.ledger.total(direction="down", version=2)
    assert 3 * 4 * 4810 <= down.payload <= 3 * (4 * 4810 + 200)


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


def test_nobody_with_data():
    with pytest.raises(EmptyRound, match="no client sent an update"):
        simulate(Ferret(), [Site("a", [])], patience=0).run()


@pytest.mark.parametrize(
    "options",
    [{"k": 1}, {"k": 65_536}, {"server_lr": 0.0}, {"weighting": "loss"}, {"staleness": -1.0}],
)
def test_options_that_cannot_work(options):
    with pytest.raises(ConfigurationError):
        Ferret(**options)
