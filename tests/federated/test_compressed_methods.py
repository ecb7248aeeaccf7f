"""SCALLION and SCAFCOM: what is compressed, what is kept, and what they reduce to."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigurationError
from anabranch.evaluation.testbeds import digits
from anabranch.federated import Sync, Uniform, splits
from anabranch.federated.codecs import Chain, Identity, Projection, Quantise, RandK, TopK
from anabranch.federated.errors import EmptyRound, SnapshotMismatch
from anabranch.federated.payload import decode, encode
from anabranch.federated.strategies.fedavg_m import FedAvgM
from anabranch.federated.strategies.scaffold import Scaffold
from anabranch.federated.strategies.scallion import Scafcom, Scallion
from tests.federated.helpers import Tamper, lost
from tests.federated.quadratics import InTurn, Point, bowls, gradient, local, places, position
from tests.federated.test_momentum_methods import RATE, STEPS, drift, run


def by_hand(made, rounds, alpha=1.0, beta=1.0, keep=1.0):
    """Both algorithms in float64; ``keep`` is Top-k's share."""
    count, size = len(made), len(made[0].target)
    x, c = np.zeros(size), np.zeros(size)
    own, mean = np.zeros((count, size)), np.zeros((count, size))
    for chosen in rounds:
        increments = []
        for i in chosen:
            y = x.copy()
            for _ in range(STEPS):
                y = y - RATE * (made[i].gradient(y) - own[i] + c)
            news = (x - y) / (RATE * STEPS) - c
            mean[i] = (1 - beta) * mean[i] + beta * (news + own[i])
            target = alpha * news if alpha < 1 else mean[i] - own[i]
            kept = np.argsort(-np.abs(target), kind="stable")[: int(np.ceil(keep * size))]
            sent = np.zeros(size)
            sent[kept] = target[kept]
            own[i] += sent
            increments.append(sent)
        x = x - RATE * STEPS * (np.mean(increments, axis=0) + c)
        c = c + np.sum(increments, axis=0) / count
    return x, c


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (Scallion(1.0, codec=Identity()), {}),
        (Scallion(0.3, codec=Identity()), {"alpha": 0.3}),
        (Scafcom(1.0, codec=Identity()), {}),
        (Scafcom(0.2, codec=Identity()), {"beta": 0.2}),
        (Scafcom(0.2, codec=TopK(0.4)), {"beta": 0.2, "keep": 0.4}),
    ],
)
def test_against_the_written_out_algorithm(strategy, options):
    made, sampler = bowls(4), InTurn(2)
    federation = run(strategy, made, Sync(8, sampler))
    x, c = by_hand(made, sampler.rounds, **options)
    assert np.allclose(position(federation.server.tensors), x, atol=2e-5)
    assert np.allclose(position(federation.server.control), c, atol=2e-5)


def test_without_damping_and_codec_both_are_scaffold_bit_for_bit():
    def trained(strategy):
        labels = digits.images()[0].labels.tolist()
        sites = digits.sites(splits.dirichlet(labels, 4, 0.3, min_size=20))
        schedule = Sync(4, Uniform(2))
        made = strategy.simulate(digits.perceptron(), digits.local(), sites, schedule=schedule)
        made.run()
        return torch.cat([t.reshape(-1) for t in made.server.tensors.values()])

    original = trained(Scaffold())
    assert torch.equal(trained(Scallion(1.0, codec=Identity())), original)
    assert torch.allclose(trained(Scafcom(1.0, codec=Identity())), original, atol=1e-6)


@settings(max_examples=12, deadline=None)
@given(
    faults=st.sets(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=6),
    strategy=st.sampled_from(
        [
            Scallion(bits=2),
            Scallion(0.5, codec=RandK(0.5)),
            Scallion(0.5, codec=Projection(4)),
            Scafcom(),
            Scafcom(codec=Chain([TopK(0.5), Quantise(4)])),
        ]
    ),
    outer=st.sampled_from([None, TopK(0.2)]),
)
def test_controls_follow_what_the_server_decoded_whoever_was_lost(faults, strategy, outer):
    """Also with a codec of the federation, which must not come in between."""
    script = {(f"c{i}", n): lost for i, n in faults}
    schedule = Sync(4, InTurn(3))
    try:
        federation = run(strategy, bowls(4), schedule, Tamper(script), patience=50, codec=outer)
    except EmptyRound:
        assume(False)  # nobody's replies were ever accepted
    assert drift(federation) < 2e-5


@pytest.mark.parametrize("strategy", [Scallion(0.2, bits=4), Scafcom(0.5, keep=0.2)])
def test_compression_does_not_move_the_fixed_point(strategy):
    """Increments vanish at the optimum, and so does what the codec takes from them."""
    made = bowls(4)
    federation = run(strategy, made, Sync(300, InTurn(2)), rate=0.1)
    assert np.linalg.norm(gradient(made, position(federation.server.tensors))) < 1e-4


def test_what_is_sent_is_counted_and_small():
    def upload(strategy):
        sites = digits.sites(splits.iid(200, 2))
        made = strategy.simulate(digits.perceptron(), digits.local(steps=1), sites, rounds=2)
        ledger = made.run().ledger
        return ledger.total(direction="up", version=1).payload / 2

    size = 4810
    full = upload(Scaffold())
    assert full == pytest.approx(4 * size, rel=0.02)
    for strategy, bits in (
        (Scallion(bits=2), 2 * size),
        (Scallion(bits=4), 4 * size),
        (Scafcom(keep=0.05), 241 * (32 + 13)),
        (Scafcom(codec=Chain([TopK(0.05), Quantise(8)])), 241 * (8 + 13)),
    ):
        extra = upload(strategy) - bits / 8
        assert 0 < extra < 600, "headers"
    assert upload(Scafcom(codec=Chain([TopK(0.05), Quantise(8)]))) * 16 < full


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda body: b"no payload", "malformed"),
        (lambda body: "text", "malformed"),
        (lambda body: encode({}), "mismatch"),
        (lambda body: encode({**decode(body), "all~top": torch.zeros(9)}), "malformed"),
        (
            lambda body: encode({**decode(body), "all~top": torch.full((3,), torch.nan)}),
            "not finite",
        ),
        (lambda body: encode(TopK(0.6).encode({"head": torch.ones(2)}, {}, None)), "mismatch"),
    ],
)
def test_increments_that_cannot_be_decoded_are_refused(change, what):
    def broken(task, reply):
        payload = decode(reply.body)
        payload["increment"] = change(payload["increment"])
        return [dataclasses.replace(reply, body=encode(payload))]

    script = {("c1", n): broken for n in range(1, 4)}
    federation = run(Scafcom(keep=0.6), bowls(3), Sync(3), Tamper(script))
    assert federation.result.incidents.count(what, "c1") == 3
    assert drift(federation) < 2e-5


@pytest.mark.parametrize(
    "make",
    [
        lambda: Scallion(0.0),
        lambda: Scallion(1.1),
        lambda: Scallion(bits=1),
        lambda: Scafcom(0.0),
        lambda: Scafcom(keep=0.0),
        lambda: Scafcom(keep=1.5),
    ],
)
def test_options_that_cannot_work(make):
    with pytest.raises(ConfigurationError):
        make()


def test_scallion_names_the_method_for_biased_codecs():
    for codec in (TopK(0.1), Chain([TopK(0.1), Quantise(8)]), Quantise(8, stochastic=False)):
        with pytest.raises(ConfigurationError, match="use scafcom"):
            Scallion(codec=codec)


def test_other_codecs_are_another_run(tmp_path):
    def made(keep):
        strategy = Scafcom(keep=keep)
        return strategy.simulate(Point(5), local(), places(bowls(3)), rounds=2, store=tmp_path)

    made(0.5).run()
    with pytest.raises(SnapshotMismatch, match="keep"):
        made(0.4).resume()


def test_projected_changes_train_as_well_on_few_bytes():
    """Also with a method that adds a direction of its own to them."""
    accuracies, uploads = {}, {}
    for codec in (None, Projection(128)):
        model = digits.perceptron()
        federation = FedAvgM(0.5).simulate(
            model, digits.local(), digits.sites(splits.iid(1000, 20)), rounds=20, codec=codec
        )
        uploads[str(codec)] = federation.run().ledger.total(direction="up").payload
        accuracies[str(codec)] = digits.watch(model)(federation.coordinator)["accuracy"]
    whole, projected = accuracies.values()
    assert projected >= whole - 0.02 and whole > 0.9
    assert uploads["None"] > 12 * min(uploads.values())
