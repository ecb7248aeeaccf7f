"""FedAvg-M, SCAFFOLD, SCAFFOLD-M and their variance-reduced forms against written-out loops."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from anabranch.errors import ConfigurationError
from anabranch.evaluation.testbeds import digits
from anabranch.federated import Site, Sync, splits
from anabranch.federated.errors import EmptyRound
from anabranch.federated.payload import decode, encode
from anabranch.federated.strategies import FedAvg
from anabranch.federated.strategies.directions import StepHook
from anabranch.federated.strategies.fedavg_m import FedAvgM
from anabranch.federated.strategies.pending import if_accepted
from anabranch.federated.strategies.scaffold import Scaffold, ScaffoldM
from anabranch.federated.strategies.warm_up import WarmUp
from anabranch.training.objective import LossOutput, Objective
from anabranch.training.trainer import Trainer
from tests.federated.helpers import Tamper, lost
from tests.federated.quadratics import (
    InTurn,
    Point,
    bowls,
    gradient,
    local,
    places,
    position,
)

RATE, STEPS = 0.1, 4


def run(strategy, made, schedule, faults=None, steps=STEPS, rate=RATE, **options):
    federation = strategy.simulate(
        Point(5), local(rate, steps), places(made), schedule=schedule, **options
    )
    federation.runtime.faults = faults
    federation.result = federation.run()
    return federation


def by_hand(made, rounds, *, controls, beta, reduced, server_lr=1.0):
    """The table and the server's lines with two vectors from each client, in float64.

    ``rounds`` are the indices of each round's clients.
    """
    size = len(made[0].target)
    x = before = np.zeros(size)
    c, own = np.zeros(size), [np.zeros(size) for _ in made]
    g = np.zeros(size)
    if reduced and beta < 1:
        g = gradient(made, x)
    for chosen in rounds:
        ends, changes = [], np.zeros(size)
        for i in chosen:
            y, raw = x.copy(), []
            for _ in range(STEPS):
                here = made[i].gradient(y)
                raw.append(here)
                corrected = -own[i] + c if controls else 0.0
                if reduced:
                    d = here + beta * corrected + (1 - beta) * (g - made[i].gradient(before))
                else:
                    d = beta * (here + corrected) + (1 - beta) * g
                y = y - RATE * d
            ends.append(y)
            if controls:
                new = np.mean(raw, axis=0)
                changes += new - own[i]
                own[i] = new
        g = np.mean([x - y for y in ends], axis=0) / (RATE * STEPS)
        before, x = x, x - server_lr * RATE * STEPS * g
        c = c + changes / len(made)
    return x, c


@pytest.mark.parametrize("server_lr", [1.0, 0.5])
@pytest.mark.parametrize(
    ("cls", "beta", "reduced"),
    [
        (FedAvgM, 0.3, False),
        (FedAvgM, 1.0, False),
        (FedAvgM, 0.3, True),
        (ScaffoldM, 0.3, False),
        (ScaffoldM, 1.0, False),
        (ScaffoldM, 0.3, True),
        (Scaffold, 1.0, False),
    ],
)
@pytest.mark.parametrize("count", [2, 4])
def test_against_the_written_out_algorithm(cls, beta, reduced, count, server_lr):
    made, sampler = bowls(4), InTurn(count)
    if cls is Scaffold:
        strategy = Scaffold(server_lr)
    else:
        strategy = cls(beta, variance_reduced=reduced, server_lr=server_lr)
    federation = run(strategy, made, strategy.schedule(8, sampler))
    controls = cls is not FedAvgM
    x, c = by_hand(
        made, sampler.rounds, controls=controls, beta=beta, reduced=reduced, server_lr=server_lr
    )
    assert len(sampler.rounds) == (7 if reduced else 8)
    assert np.allclose(position(federation.server.tensors), x, atol=2e-5)
    if controls:
        assert np.allclose(position(federation.server.control), c, atol=2e-5)


@pytest.mark.parametrize("reduced", [False, True])
def test_beta_1_is_fedavg_and_scaffold(reduced):
    labels = digits.images()[0].labels.tolist()
    places = digits.sites(splits.dirichlet(labels, 4, 0.3, min_size=20))

    def trained(strategy):
        federation = strategy.simulate(digits.perceptron(), digits.local(), places, rounds=3)
        federation.run()
        return torch.cat([t.reshape(-1) for t in federation.server.tensors.values()])

    plain = trained(FedAvg(weighting="uniform"))
    assert torch.allclose(trained(FedAvgM(1.0, reduced)), plain, atol=1e-6)
    assert torch.allclose(trained(ScaffoldM(1.0, reduced)), trained(Scaffold()), atol=1e-6)
    assert not torch.allclose(trained(Scaffold()), plain, atol=1e-3)


@pytest.mark.parametrize("cls", [FedAvgM, ScaffoldM])
def test_variance_reduced_with_exact_gradients_and_one_step_follows_the_full_gradient(cls):
    """The recursive estimate is then the gradient of everyone's mean loss, in every round."""
    made, strategy = bowls(3), cls(0.2, variance_reduced=True)
    seen = []

    def watch(coordinator):
        seen.append((coordinator.server.before, coordinator.server.momentum))

    run(strategy, made, strategy.schedule(6), steps=1, watch=watch)
    for model, direction in seen:
        assert np.allclose(position(direction), gradient(made, position(model)), atol=1e-5)


def test_drift_falls_with_beta_and_controls_remove_it():
    """Where gradients are exact and clients differ, FedAvg stops short of the optimum."""
    made = bowls(3, spread=5.0)

    def left(strategy):
        schedule = strategy.schedule(120)
        federation = run(strategy, made, schedule, steps=5, rate=0.3)
        return np.linalg.norm(gradient(made, position(federation.server.tensors)))

    plain, mixed = left(FedAvg(weighting="uniform")), left(FedAvgM(0.1))
    assert plain > 0.05 and mixed <= 0.2 * plain
    assert left(Scaffold()) < 1e-4 and left(ScaffoldM(0.1)) < 1e-3


def test_scaffold_finds_the_optimum_when_few_take_part():
    made = bowls(4)
    federation = run(Scaffold(), made, Sync(200, InTurn(2)), rate=0.2)
    assert np.linalg.norm(gradient(made, position(federation.server.tensors))) < 1e-4


@settings(max_examples=12, deadline=None)
@given(
    faults=st.sets(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=8),
    reduced=st.booleans(),
    data=st.data(),
)
def test_the_control_is_the_mean_of_the_clients_controls_whoever_was_lost(faults, reduced, data):
    """Lost replies, refused replies, and replies that came twice."""

    def poison(task, reply):
        payload = decode(reply.body)
        first = next(name for name in payload if name.startswith("increment/"))
        broken = {**payload, first: payload[first] * float("nan")}
        return [dataclasses.replace(reply, body=encode(broken))]

    kinds = [lost, poison, lambda task, reply: [reply, reply]]
    script = {(f"c{i}", n): data.draw(st.sampled_from(kinds)) for i, n in sorted(faults)}
    strategy = ScaffoldM(0.5, variance_reduced=reduced)
    schedule = Sync(4, InTurn(3))
    try:
        federation = run(strategy, bowls(4), schedule, Tamper(script), patience=50)
    except EmptyRound:
        assume(False)  # nobody's replies were ever accepted
    assert drift(federation) < 2e-5


def drift(federation):
    """How far the server's control is from its clients' mean, relative where that is large."""
    accepted = federation.coordinator.state.accepted
    own = [
        if_accepted(federation.runtime.node(name).state, accepted.get(name, 0)).get("control")
        for name in federation.runtime.sites
    ]
    worst = 0.0
    for name, tensor in federation.server.control.items():
        mean = sum(control[name].double() for control in own if control) / len(own)
        worst = max(worst, float(((tensor - mean).abs() / mean.abs().clamp(min=1)).max()))
    return worst


def test_a_client_that_joins_late_has_a_control_of_zero():
    made = bowls(3)
    federation = run(Scaffold(), made, Sync(3, InTurn(2)))
    server = federation.server
    server.known = {"c0", "c1"}
    half = position(server.control)
    server.known = {"c0", "c1", "c2", "new"}
    assert np.allclose(position(server.control), half / 2, atol=1e-6)


def test_warm_up_asks_everyone_once_and_moves_nothing():
    made, strategy = bowls(4), FedAvgM(variance_reduced=True)
    schedule = strategy.schedule(2, InTurn(1))
    assert isinstance(schedule, WarmUp)
    federation = run(
        strategy, made, schedule, watch=lambda c: {"at": float(c.server.tensors["head"][0])}
    )
    result = federation.result
    assert result.ledger.total(direction="up", version=0).messages == 4
    assert result.ledger.total(direction="up", version=1).messages == 1
    assert result.history[0]["at"] == 0 != result.history[1]["at"]


def test_momentum_doubles_what_clients_are_sent():
    def bytes_of(strategy):
        model = digits.perceptron()
        federation = strategy.simulate(
            model, digits.local(steps=1), digits.sites(splits.iid(200, 2)), rounds=2
        )
        ledger = federation.run().ledger
        return [ledger.total(direction=d, version=1).payload for d in ("down", "up")]

    down, up = bytes_of(FedAvg())
    for strategy, copies_down, copies_up in (
        (FedAvgM(), 2, 1),
        (FedAvgM(variance_reduced=True), 3, 1),
        (Scaffold(), 2, 1),
        (ScaffoldM(), 3, 1),
        (ScaffoldM(variance_reduced=True), 4, 2),
    ):
        assert bytes_of(strategy) == pytest.approx([copies_down * down, copies_up * up], rel=0.01)


class Dropped(Objective):
    """A loss that dropout changes from draw to draw."""

    def plan(self, items):
        return [torch.tensor(items, dtype=torch.float32)[:, None]]

    def denominators(self, items):
        return {"rows": len(items)}

    def loss(self, model, micro_batch, denominators):
        return LossOutput(model(micro_batch).sum() / denominators["rows"])


def test_the_second_gradient_of_a_step_has_its_examples_dropout_and_frozen_statistics():
    model = nn.Sequential(nn.Linear(1, 40), nn.BatchNorm1d(40), nn.Dropout(0.5), nn.Linear(40, 1))
    found = []

    class Again(StepHook):
        def after_gradients(self, trainer):
            first = {name: p.grad.clone() for name, p in trainer.trainable.items()}
            weights = {name: p.detach().clone() for name, p in trainer.trainable.items()}
            again = self.gradients_at(trainer, weights)
            moved = self.gradients_at(trainer, {n: 2 * w for n, w in weights.items()})
            found.append((first, again, moved))
            for name, p in trainer.trainable.items():
                assert torch.equal(p, weights[name]) and torch.equal(p.grad, first[name])

    options = local(steps=3).options.model_copy(update={"batch": 4})
    trainer = Trainer(model, Dropped(), options, list(range(12)), hooks=[Again()])
    for _ in range(3):
        trainer.step(trainer.next_items())
    for first, again, moved in found:
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["0.weight"], moved["0.weight"])
    assert torch.equal(model[1].running_mean, torch.zeros(40))
    assert (found[0][0]["3.weight"] != 0).any() and (found[0][0]["3.weight"] == 0).any()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda p: {**p, "reach": -1.0}, "malformed"),
        (lambda p: {k: v for k, v in p.items() if k != "reach"}, "malformed"),
        (lambda p: {k: v for k, v in p.items() if k != "increment/head"}, "mismatch"),
        (lambda p: {**p, "increment/head": torch.zeros(3)}, "mismatch"),
        (lambda p: {**p, "increment/head": torch.zeros(2).double()}, "mismatch"),
        (lambda p: {**p, "increment/other": torch.zeros(2)}, "mismatch"),
        (lambda p: {**p, "increment/head": torch.full((2,), torch.inf)}, "not finite"),
    ],
)
def test_replies_that_cannot_be_used_leave_no_trace(change, what):
    def broken(task, reply):
        return [dataclasses.replace(reply, body=encode(change(decode(reply.body))))]

    made = bowls(3)
    script = {("c1", n): broken for n in range(1, 5)}
    federation = run(Scaffold(), made, Sync(4), Tamper(script))
    assert federation.result.incidents.count(what, "c1") == 4
    assert drift(federation) < 2e-5
    control = position(federation.server.control)
    without = run(Scaffold(), made, Sync(4), Tamper({("c1", n): lost for n in range(1, 5)}))
    assert np.array_equal(control, position(without.server.control))


def test_clients_without_data_count_for_nothing():
    made = bowls(2)
    alone = run(ScaffoldM(), made, Sync(3))
    sites = [*places(made), Site("empty", [])]
    federation = ScaffoldM().simulate(Point(5), local(RATE, STEPS), sites, rounds=3)
    federation.run()
    assert np.array_equal(position(alone.server.tensors), position(federation.server.tensors))
    nobody = ScaffoldM().simulate(Point(5), local(), [Site("empty", [])])
    with pytest.raises(EmptyRound):
        nobody.run()


def test_a_direction_that_grows_and_grows_is_reported(caplog):
    start = {"w": torch.zeros(1)}
    server = FedAvgM(variance_reduced=True).server(start)
    for version in range(21):
        assert "the direction grew" not in caplog.text
        sums = {"direction/w": torch.tensor([1.13**version], dtype=torch.float64)}
        server.commit({"sums": sums, "count": 1, "reach": 0.1, "moved": 1, "clients": ["a"]})
    assert "fedavg_m: the direction grew from 1 to 11.5 in 20 versions" in caplog.text


@pytest.mark.parametrize(
    "make",
    [
        lambda: FedAvgM(0.0),
        lambda: FedAvgM(1.5),
        lambda: ScaffoldM(float("nan")),
        lambda: Scaffold(server_lr=0.0),
        lambda: FedAvgM(server_lr=float("inf")),
        lambda: FedAvgM().client(local(optimizer="adamw")),
        lambda: ScaffoldM().client(local(momentum=0.9)),
        lambda: Scaffold().client(local(optimizer="adamw", weight_decay=0.1)),
        lambda: Scaffold().client(local(precision="fp16")),
    ],
)
def test_options_that_cannot_work(make):
    with pytest.raises(ConfigurationError):
        make()


def test_scaffold_with_adamw_shares_gradients():
    """Controls are means of the losses' gradients then, whatever the optimiser made of them."""
    made = bowls(1)
    strategy = Scaffold()
    federation = strategy.simulate(
        Point(5), local(0.01, 1, optimizer="adamw"), places(made), rounds=1
    )
    federation.run()
    expected = gradient(made, np.zeros(5))
    assert np.allclose(position(federation.server.control), expected, atol=1e-5)
    assert np.allclose(position(federation.server.tensors), -0.01 * expected, atol=1e-6)
