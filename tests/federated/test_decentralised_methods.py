"""DFedAvgM, DFedSAM and DFedSAM-MGS: peers without a server."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from anabranch import registry
from anabranch.errors import ConfigurationError
from anabranch.evaluation.testbeds import digits
from anabranch.federated import DeviceProfile, Site, Uniform, splits
from anabranch.federated.codecs import Quantise
from anabranch.federated.consensus import consensus
from anabranch.federated.errors import FederationError, SnapshotMismatch, TopologyError
from anabranch.federated.shared import lent
from anabranch.federated.strategies import FedAvg
from anabranch.federated.strategies.dfedavgm import DFedAvgM
from anabranch.federated.strategies.dfedsam import DFedSAM, DFedSAMMGS
from anabranch.federated.topologies import complete, metropolis, ring, spectral
from anabranch.training.objective import LossOutput, Objective
from anabranch.training.options import TrainOptions
from anabranch.training.sam import SharpnessAware
from anabranch.training.trainer import Trainer
from tests.federated.helpers import (
    Tamper,
    assert_killed_ends_the_same,
    lost,
)

ALL = [
    pytest.param(cls, id=name)
    for name, cls in registry.available("strategies").items()
    if cls.decentralised
]
PEERS = 5


def sites(peers=PEERS):
    return [
        Site(f"c{i}", list(range(20 * i, 20 * i + 20)), DeviceProfile(0.1 * (1 + i)))
        for i in range(peers)
    ]


def run(strategy, rounds=2, places=None, local=None, **options):
    federation = strategy.simulate(
        digits.perceptron(),
        local or digits.local(lr=0.05, steps=4),
        places or sites(),
        rounds,
        **options,
    )
    federation.run()
    return federation


def flat(tensors):
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


def stacked(federation):
    """Models of the peers, [n, d]."""
    return torch.stack([flat(model) for model in consensus(federation).models.values()])


@pytest.mark.parametrize("cls", ALL)
class TestEveryDecentralisedStrategy:
    def test_learns_something_with_its_defaults(self, cls):
        labels = digits.images()[0].labels[:300].tolist()
        places = digits.sites(splits.dirichlet(labels, 4, 0.5, min_size=10))
        found = consensus(run(cls(), 12, places, digits.local()))
        model = digits.perceptron()

        def accuracy(tensors):
            with lent(model, tensors):
                return digits.accuracy(model)

        before = digits.accuracy(model)
        assert accuracy(found.mean) > before + 0.3
        assert all(accuracy(own) > before + 0.15 for own in found.models.values())

    def test_does_not_depend_on_the_order_in_which_peers_run(self, cls):
        def models(order):
            made = cls().simulate(digits.perceptron(), digits.local(steps=2), sites(), 2)
            made.runtime.order = order
            made.run()
            return stacked(made)

        assert torch.equal(models(None), models(lambda tasks: tasks[::-1]))

    def test_leaves_the_simulated_model_as_it_was(self, cls):
        model = digits.perceptron()
        before = copy.deepcopy(model.state_dict())
        cls().simulate(model, digits.local(steps=2), sites(), 1).run()
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    def test_killed_after_any_input_it_ends_the_same(self, cls, tmp_path):
        def make(store, **options):
            return cls(**options).simulate(
                digits.perceptron(), digits.local(steps=1), sites(), 2, store=store
            )

        assert_killed_ends_the_same(make, tmp_path, [8])
        with pytest.raises(SnapshotMismatch, match="momentum"):
            make(tmp_path / "8", momentum=0.5).resume()

    def test_counts_every_message_to_a_neighbour(self, cls):
        strategy = cls()
        ledger = run(strategy, rounds=2).coordinator.state.ledger
        body = ledger.total(direction="up", kind="train").payload / (2 * PEERS)
        # In a ring everyone hears two neighbours in each mixing step.
        mixing = ledger.total(direction="down", kind="mix")
        assert mixing.messages == 2 * PEERS * strategy.mixing_steps
        assert mixing.payload == pytest.approx(2 * body * mixing.messages, rel=0.05)

    def test_works_with_a_codec_and_with_a_peer_that_fails(self, cls):
        assert stacked(run(cls(), codec=Quantise(8))).isfinite().all()
        made = cls().simulate(digits.perceptron(), digits.local(steps=1), sites(), 2)
        made.runtime.faults = Tamper({("c1", 1): lost, ("c2", 2): lost})
        made.run()
        assert stacked(made).isfinite().all() and len(stacked(made)) == PEERS

    def test_refuses_a_star_and_bad_options_by_name(self, cls):
        from anabranch.federated import Star

        with pytest.raises(TopologyError, match="graph"):
            run(cls(), topology=Star())
        for options in (
            {"mixing_steps": 0},
            {"momentum": 1.0},
            {"momentum": -0.1},
            {"lr_decay": 0.0},
            {"lr_decay": 1.1},
        ):
            with pytest.raises(ConfigurationError, match=next(iter(options))):
                cls(**options)
        with pytest.raises(ConfigurationError, match="belongs to sgd, not to adamw"):
            cls().client(digits.local(optimizer="adamw"))
        with pytest.raises(ConfigurationError, match="sampler"):
            cls().schedule(3, Uniform(2))


@pytest.mark.parametrize("steps", [1, 3])
def test_mixing_is_the_matrix_power_and_keeps_the_mean(steps):
    places = sites(6)
    weights = metropolis(ring(6))
    local = digits.local(lr=0.05, steps=4)
    strategy = DFedAvgM(mixing_steps=steps)
    federation = strategy.simulate(digits.perceptron(), local, places, 1)
    before = {}
    handle = federation.coordinator.server.fold

    def spy(acc, update):
        if update.kind == "train":
            node = federation.runtime.node(update.client)
            before[update.client] = flat(node.state["own"]).double()
        return handle(acc, update)

    federation.coordinator.server.fold = spy
    federation.run()
    trained = torch.stack([before[name] for name in sorted(before)])
    expected = torch.from_numpy(np.linalg.matrix_power(weights, steps)) @ trained
    mixed = stacked(federation).double()
    assert torch.allclose(mixed, expected, atol=1e-6)
    assert torch.allclose(mixed.mean(0), trained.mean(0), atol=1e-6)
    spread = (trained - trained.mean(0)).square().sum(1).mean()
    bound = spectral(weights) ** (2 * steps) * float(spread)
    assert consensus(federation).distance <= bound * (1 + 1e-4)


def test_joined_with_everyone_and_without_momentum_it_is_fedavg():
    decentralised = DFedAvgM(momentum=0.0, lr_decay=1.0, edges=complete)
    peers = run(decentralised, rounds=1)
    server = run(FedAvg(weighting="uniform"), rounds=1)
    for row in stacked(peers):
        assert torch.allclose(row, flat(server.server.tensors), atol=1e-6)


def test_without_looking_around_dfedsam_is_dfedavgm_bit_for_bit():
    assert torch.equal(stacked(run(DFedSAM(rho=0.0))), stacked(run(DFedAvgM())))
    assert torch.equal(stacked(run(DFedSAMMGS())), stacked(run(DFedSAM(mixing_steps=4))))
    assert not torch.equal(stacked(run(DFedSAM(rho=0.05))), stacked(run(DFedAvgM())))


def test_the_rate_decays_by_rounds_not_by_versions():
    local = digits.local(lr=0.1, steps=2)
    seen = []

    class Noting(type(local)):
        def for_task(self, work, seed):
            options = super().for_task(work, seed)
            seen.append(options.lr)
            return options

    run(
        DFedAvgM(mixing_steps=2, lr_decay=0.5, momentum=0.0),
        rounds=3,
        local=Noting(local.objective, local.options),
    )
    assert seen == [0.1] * PEERS + [0.05] * PEERS + [0.025] * PEERS


def test_a_sharpness_aware_step_counts_twice():
    plain, aware = run(DFedAvgM(lr_decay=1.0), 1), run(DFedSAM(lr_decay=1.0), 1)
    assert aware.coordinator.state.now == pytest.approx(2 * plain.coordinator.state.now)


def test_there_is_no_consensus_with_a_server():
    with pytest.raises(FederationError, match="no peer has a model"):
        consensus(run(FedAvg(), rounds=1))


class Quadratic(Objective):
    """``x^T A x / 2`` through a layer with dropout that does nothing unless asked to."""

    def __init__(self, matrix):
        self.matrix = matrix

    def plan(self, items):
        return [items]

    def denominators(self, items):
        return {"items": len(items)}

    def loss(self, model, micro_batch, denominators):
        x = model(None)
        return LossOutput(x @ self.matrix @ x / 2)


class Point(nn.Module):
    def __init__(self, value, dropout=0.0):
        super().__init__()
        self.x = nn.Parameter(torch.tensor(value))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, _):
        self.calls += 1
        return self.dropout(self.x)


def options(**changes):
    values = {"optimizer": "sgd", "schedule": "constant", "warmup": 0.0, "clip": None}
    return TrainOptions.model_validate({**values, "precision": "fp32", "steps": 9, **changes})


def test_a_step_on_a_quadratic_is_the_closed_form():
    matrix = torch.tensor([[3.0, 0.5], [0.5, 1.0]])
    rho, lr, momentum = 0.2, 0.1, 0.9
    model = Point([1.0, -2.0])
    trainer = Trainer(
        model,
        Quadratic(matrix),
        options(lr=lr, momentum=momentum),
        [0],
        hooks=[SharpnessAware(rho)],
    )
    x, velocity = torch.tensor([1.0, -2.0]), torch.zeros(2)
    for count in range(1, 5):
        trainer.step([0])
        g = matrix @ x
        velocity = momentum * velocity + matrix @ (x + rho * g / g.norm())
        x = x - lr * velocity
        assert torch.allclose(model.x, x, atol=1e-6)
        assert float(model.calls) == count, "the second pass must not count in buffers"


def test_both_gradients_see_the_same_dropout_and_the_generators_go_on_as_without():
    """With A = I the gradient at x + rho g/|g| has zeros exactly where g has."""
    torch.manual_seed(0)
    model = Point([1.0] * 64, dropout=0.5)
    seen = []

    class After(SharpnessAware):
        def after_gradients(self, trainer):
            first = model.x.grad.clone()
            super().after_gradients(trainer)
            seen.append((first, model.x.grad.clone()))

    trainer = Trainer(model, Quadratic(torch.eye(64)), options(lr=1e-3), [0], hooks=[After(0.1)])
    for _ in range(3):
        trainer.step([0])
    masks = [first != 0 for first, _ in seen]
    assert all(torch.equal(first != 0, second != 0) for first, second in seen)
    assert not torch.equal(masks[0], masks[1])


def test_a_zero_gradient_stays_and_a_negative_rho_is_refused():
    model = Point([0.0, 0.0])
    hook = SharpnessAware(0.5)
    Trainer(model, Quadratic(torch.eye(2)), options(lr=1.0), [0], hooks=[hook]).step([0])
    assert torch.equal(model.x.detach(), torch.zeros(2))
    for rho in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ConfigurationError, match="rho"):
            SharpnessAware(rho)
        with pytest.raises(ConfigurationError, match="rho"):
            DFedSAM(rho=rho)
