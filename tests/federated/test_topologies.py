"""Trees, graphs and gossip."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.federated import Federation, Gossip, Graph, Simulation, Site, Star, Sync, Tree
from anabranch.federated.errors import MixingMatrixError, TopologyError
from anabranch.federated.gossip import Peer, Relay
from anabranch.federated.topologies import (
    complete,
    exponential,
    metropolis,
    regular,
    ring,
    spectral,
    torus,
)
from tests.federated.helpers import Tamper, VectorClient, fingerprint, lost, names, sites


@given(st.integers(1, 40), st.integers(2, 6))
def test_balanced_trees_hold_everyone_once(clients, fan_in):
    tree = Tree.balanced(names(clients), fan_in)
    listed = list(itertools.chain(*tree.children.values()))
    assert sorted(n for n in listed if n not in tree.children) == sorted(names(clients))
    assert max(map(len, tree.children.values())) <= fan_in


@pytest.mark.parametrize(
    ("children", "says"),
    [
        ({"a": ["x"], "b": ["x"]}, "x would send to two"),
        ({"a": ["b"], "b": ["a"]}, "a circle"),
        ({"a": ["x"], "b": ["y"]}, "one aggregator is the root"),
        ({"top": ["x"], "a": ["b"], "b": ["a"]}, "not reached from a, b"),
        ({}, "one aggregator is the root"),
    ],
)
def test_trees_that_are_none(children, says):
    with pytest.raises(TopologyError, match=says):
        Tree(children)


GRAPHS = {
    "ring of 16": (ring(16), 0.949),
    "torus of 4 x 4": (torus(4, 4), 0.600),
    "exponential of 16": (exponential(16), 0.500),
    "complete of 16": (complete(16), 0.0),
}


@pytest.mark.parametrize(("edges", "second"), GRAPHS.values(), ids=GRAPHS)
def test_metropolis_weights_are_doubly_stochastic_with_the_known_gap(edges, second):
    weights = metropolis(edges)
    assert np.allclose(weights, weights.T) and (weights >= 0).all()
    assert np.allclose(weights.sum(0), 1) and np.allclose(weights.sum(1), 1)
    assert spectral(weights) == pytest.approx(second, abs=1e-3)


def test_random_regular_graphs():
    edges = regular(16, 3, seed=5)
    assert (edges.sum(1) == 3).all() and (edges == edges.T).all()
    assert (edges == regular(16, 3, seed=5)).all() and (edges != regular(16, 3, seed=6)).any()
    with pytest.raises(TopologyError):
        regular(5, 3)


def test_graphs_that_are_none():
    two = np.zeros((4, 4), dtype=bool)
    two[0, 1] = two[1, 0] = two[2, 3] = two[3, 2] = True
    with pytest.raises(TopologyError, match="2 parts: c0, c1; c2, c3"):
        Graph(names(4), metropolis(two))
    weights = metropolis(ring(4))
    weights[2, 2] += 0.1
    with pytest.raises(MixingMatrixError, match=r"row 2 sums to 1.1, not 1"):
        Graph(names(4), weights)
    skewed = np.array([[0.5, 0.5, 0], [0.2, 0.5, 0.3], [0.3, 0, 0.7]])
    with pytest.raises(MixingMatrixError, match="row 0 is not symmetric"):
        Graph(names(3), skewed)
    with pytest.raises(MixingMatrixError, match="row 0 has a negative"):
        Graph(names(2), np.array([[1.5, -0.5], [-0.5, 1.5]]))
    with pytest.raises(TopologyError, match="directed"):
        metropolis(np.triu(np.ones((3, 3)), 1))


class Still(VectorClient):
    """Trains nothing, so that only mixing moves the peers."""

    def run(self, ctx, kind, payload):
        return {name: torch.zeros_like(x) for name, x in payload.items()}, 1


class Scattered(Peer):
    """Begins somewhere of its own."""

    def setup(self, ctx):
        ctx.state["own"] = {"x": torch.from_numpy(ctx.rng.standard_normal(5))}


def gossip(edges, steps, client=None, rounds=1, **options):
    count = len(edges)
    graph = Graph(names(count), metropolis(edges))
    runtime = Simulation(
        [
            Site(name, range(3), site.profile)
            for name, site in zip(names(count), sites(count), strict=True)
        ],
        **options,
    )
    peer = client or Scattered(Still())
    return Federation(Relay(), peer, Gossip(rounds, mixing_steps=steps), runtime, topology=graph)


def positions(federation):
    runtime = federation.runtime
    return torch.stack([runtime.node(n).state["own"]["x"] for n in runtime.sites])


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("edges", [ring(7), torus(3, 3), complete(4), ring(2), ring(1)])
def test_q_mixing_steps_are_w_to_the_power_of_q(edges, steps):
    federation = gossip(edges, steps)
    result = federation.run()
    start = gossip(edges, steps)
    start.runtime.open(federation._agreement())
    before = positions(start).numpy()
    power = np.linalg.matrix_power(metropolis(edges), steps)
    after = positions(federation).numpy()
    assert np.allclose(after, power @ before, atol=1e-12)
    assert np.allclose(after.mean(0), before.mean(0), atol=1e-12)
    assert result.version == 1 + steps
    # One message up and one down for each peer and step; what goes down carries deg bodies.
    assert result.ledger.total(kind="mix").messages == 2 * steps * len(edges)


def test_the_relay_never_reads_what_it_hands_on():
    federation = gossip(ring(4), 2)
    federation.run()
    assert federation.server.opaque
    assert all(isinstance(body, bytes) for _, body in federation.server.mailbox.values())


def test_a_missed_step_uses_the_last_message_and_a_missed_round_ones_own():
    faults = Tamper({("c1", 3): lost})  # the second of two mixing steps
    federation = gossip(ring(4), 2, faults=faults)
    result = federation.run()
    assert result.version == 3 and result.incidents.count("lost", "c1") == 1
    silent = gossip(ring(3), 1, faults=Tamper({("c1", 1): lost}))
    silent.run()
    start = gossip(ring(3), 1)
    start.runtime.open(silent._agreement())
    before = positions(start)
    after = positions(silent)
    # c0 and c2 got nothing of c1, whose weight of 1/3 went to themselves.
    assert torch.allclose(after[0], before[0] * 2 / 3 + before[2] / 3)
    assert torch.allclose(after[1], before.mean(0))


def test_peers_need_a_graph():
    runtime = Simulation(sites(3))
    with pytest.raises(TopologyError, match="graph for a topology, not Star"):
        Federation(Relay(), Scattered(Still()), Gossip(1), runtime, topology=Star()).run()


def test_gossip_does_not_depend_on_order_and_sync_is_something_else():
    one, other = gossip(ring(5), 2, rounds=3), gossip(ring(5), 2, rounds=3, order=lambda t: t[::-1])
    one.run(), other.run()
    assert fingerprint(one) == fingerprint(other)
    assert Sync(3).versions == 3 != Gossip(3, mixing_steps=2).versions == 9
