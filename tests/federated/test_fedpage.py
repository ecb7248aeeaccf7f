"""FedPAGE against its written-out algorithm."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from anabranch.errors import ConfigurationError
from anabranch.evaluation.testbeds import digits
from anabranch.federated import DeviceProfile, Site, Sync
from anabranch.federated.errors import EmptyRound
from anabranch.federated.payload import decode, encode
from anabranch.federated.strategies.fedpage import FedPage
from tests.federated.helpers import Tamper
from tests.federated.quadratics import InTurn, Point, bowls, gradient, local, places, position
from tests.federated.test_momentum_methods import RATE, STEPS, run


def by_hand(made, full, rounds, steps=STEPS, server_lr=1.0):
    """Zhao et al. 2021 in float64; ``full`` are the numbers of the full rounds."""
    x = before = np.zeros(len(made[0].target))
    g, rounds = np.zeros_like(x), iter(rounds)
    for number in range(len(full)):
        if full[number]:
            change = -RATE * steps * gradient(made, x)
        else:
            changes = []
            for i in next(rounds):
                y, last = x, before
                d = g
                for _ in range(steps):
                    d = d + made[i].gradient(y) - made[i].gradient(last)
                    last, y = y, y - RATE * d
                changes.append(y - x)
            change = np.mean(changes, axis=0)
        g = -change / (RATE * steps)
        before, x = x, x + server_lr * change
    return x, g


@pytest.mark.parametrize("options", [{}, {"probability": 0.2}, {"server_lr": 0.5}])
@pytest.mark.parametrize("steps", [1, STEPS])
def test_against_the_written_out_algorithm(options, steps):
    made, sampler = bowls(4), InTurn(2)
    strategy = FedPage(**options)
    federation = run(strategy, made, strategy.schedule(9, sampler), steps=steps)
    history = federation.result.history
    full = [bool(figures["full"]) for figures in history]
    assert full[0] and not all(full) and len(sampler.rounds) == full.count(False)
    assert all(f["clients"] == (4 if f["full"] else 2) for f in history)
    x, g = by_hand(made, full, sampler.rounds, steps, options.get("server_lr", 1.0))
    assert np.allclose(position(federation.server.tensors), x, atol=2e-5)
    assert np.allclose(position(federation.server.direction), g, atol=2e-4)


def test_full_rounds_alone_are_gradient_descent():
    made = bowls(4)
    strategy = FedPage(1.0)
    federation = run(strategy, made, strategy.schedule(5, InTurn(2)))
    x = np.zeros(5)
    for _ in range(5):
        x = x - RATE * STEPS * gradient(made, x)
    assert np.allclose(position(federation.server.tensors), x, atol=1e-5)


def test_finds_the_optimum_when_few_take_part():
    made, sampler = bowls(4), InTurn(2)
    strategy = FedPage(0.3)
    federation = run(strategy, made, strategy.schedule(120, sampler), rate=0.2)
    assert len(sampler.rounds) > 60
    assert np.linalg.norm(gradient(made, position(federation.server.tensors))) < 1e-4


def test_only_other_than_full_rounds_are_told_a_direction():
    strategy = FedPage(0.4)
    federation = run(strategy, bowls(2), strategy.schedule(8))
    history, ledger = federation.result.history, federation.result.ledger
    down = [ledger.total(direction="down", version=v).payload for v in range(8)]
    full = {down[v] for v, figures in enumerate(history) if figures["full"]}
    others = {down[v] for v, figures in enumerate(history) if not figures["full"]}
    assert len(full) == len(others) == 1 and min(others) > 2 * max(full)


def test_a_schedule_of_the_users_asks_whom_it_likes():
    federation = run(FedPage(1.0), bowls(4), Sync(3, InTurn(2)))
    assert [(f["full"], f["clients"]) for f in federation.result.history] == [(1, 2)] * 3


def test_both_large_batches_are_of_the_same_examples():
    """Where two versions are the same the correction is nothing: on along the last direction."""
    found = []

    def watch(coordinator):
        server = coordinator.server
        server.before, server._message = server.tensors, None
        found.append(server.direction)
        return {}

    strategy, sites = FedPage(1e-9, large_batch=7), [Site("a", list(range(40)))]
    sgd = digits.local(lr=0.05, steps=1)
    strategy.simulate(digits.perceptron(), sgd, sites, rounds=2, watch=watch).run()
    first, second = found
    assert all(torch.allclose(second[name], g, atol=1e-6) for name, g in first.items())
    assert sum(float(g.square().sum()) for g in first.values()) > 0.01


def test_clients_without_data_do_not_count():
    made = bowls(2)
    sites = [*places(made), Site("empty", [])]
    federation = FedPage().simulate(Point(5), local(RATE, STEPS), sites, rounds=4)
    federation.run()
    alone = run(FedPage(), made, FedPage().schedule(4))
    assert np.array_equal(position(federation.server.tensors), position(alone.server.tensors))
    with pytest.raises(EmptyRound):
        FedPage().simulate(Point(5), local(), [Site("empty", [])]).run()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda p: {**p, "reach": -1.0}, "malformed"),
        (lambda p: {**p, "reach": float("inf")}, "not finite"),
        (lambda p: {k: v for k, v in p.items() if k != "reach"}, "malformed"),
        (lambda p: {k: v for k, v in p.items() if k != "head"}, "mismatch"),
        (lambda p: {**p, "head": p["head"] * float("nan")}, "not finite"),
    ],
)
def test_replies_that_cannot_be_used(change, what):
    def broken(task, reply):
        return [dataclasses.replace(reply, body=encode(change(decode(reply.body))))]

    strategy = FedPage()
    federation = run(strategy, bowls(3), strategy.schedule(3), Tamper({("c1", 2): broken}))
    assert federation.result.incidents.count(what, "c1") == 1
    assert sorted(f["clients"] for f in federation.result.history) == [2, 3, 3]


def test_a_client_whose_direction_blows_up_fails():
    strategy = FedPage(1e-9)
    with pytest.raises(EmptyRound, match="the direction grew from"):
        run(strategy, bowls(2), strategy.schedule(2), steps=60, rate=5.0)


def test_sites_with_less_than_a_large_batch_are_named_once(caplog):
    sizes = {"a": 40, "b": 5, "empty": 0, "late": 3}
    sites = [
        Site(name, list(range(size)), DeviceProfile(1.0), joins=float(name == "late"))
        for name, size in sizes.items()
    ]
    strategy = FedPage(large_batch=20)
    federation = strategy.simulate(digits.perceptron(), digits.local(batch=8), sites, rounds=4)
    federation.run()
    said = [record.message for record in caplog.records if "examples" in record.message]
    assert said == [
        "without examples, and so without a say: empty",
        "large_batch is 20; these have fewer examples and use all: b",
        "large_batch is 20; these have fewer examples and use all: late",
    ]


@pytest.mark.parametrize(
    "options",
    [{"probability": 0.0}, {"probability": 1.1}, {"large_batch": 0}, {"server_lr": -1.0}],
)
def test_options_that_cannot_work(options):
    with pytest.raises(ConfigurationError):
        FedPage(**options)


def test_local_training_must_be_plain():
    with pytest.raises(ConfigurationError, match="plain SGD"):
        FedPage().client(local(optimizer="adamw"))
