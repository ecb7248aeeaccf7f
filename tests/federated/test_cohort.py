"""Sites that train as one batch end where each would have ended alone."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anabranch.evaluation.testbeds import digits
from anabranch.federated import Federation, Simulation, Site, cohort, splits
from anabranch.federated.local import LocalTraining
from anabranch.federated.strategies import FedAvg, FedProx
from anabranch.federated.strategies.scaffold import Scaffold
from anabranch.training.options import TrainOptions
from anabranch.training.trainer import Trainer


@pytest.fixture
def alone(monkeypatch):
    """Counts steps that the trainer took, that is, those of sites that trained alone."""
    steps = Counter()
    step = Trainer.step

    def counted(self, items):
        steps["trainer"] += 1
        return step(self, items)

    monkeypatch.setattr(Trainer, "step", counted)
    return steps


def run(together, sites, local, strategy=None, rounds=2, model=None, **options):
    strategy = strategy or FedAvg()
    model = model or digits.perceptron()
    runtime = Simulation(sites, model, together=together, **options)
    federation = Federation(
        strategy.begin(model), strategy.client(local), strategy.schedule(rounds), runtime
    )
    return federation.run(), federation.coordinator.server


def assert_alike(sites, local, strategy=None, **options):
    (one, first), (other, second) = (
        run(together, sites, local, strategy, **options) for together in (False, True)
    )
    for name, tensor in first.tensors.items():
        torch.testing.assert_close(second.tensors[name], tensor, rtol=1e-4, atol=1e-6)
    assert payloads(other) == payloads(one)
    assert other.incidents.state_dict() == one.incidents.state_dict()
    assert other.seconds == one.seconds
    return one, other


def payloads(result):
    """The ledger but for the envelopes, in which a loss may have a digit more."""
    return [row[:-1] for row in result.ledger.state_dict()["rows"]]


def iid(clients):
    return digits.sites(splits.iid(digits.TRAIN, clients))


@settings(max_examples=12, deadline=None)
@given(
    optimizer=st.sampled_from(
        [
            {"optimizer": "sgd", "lr": 0.1},
            {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9},
            # With AdamW's own epsilon a gradient of nothing but rounding becomes a whole step.
            {"optimizer": "adamw", "lr": 0.003, "eps": 1e-3},
        ]
    ),
    clip=st.sampled_from([None, 0.05, 10.0]),
    decay=st.sampled_from([0.0, 0.1]),
    schedule=st.sampled_from(["constant", "cosine"]),
    warmup=st.sampled_from([0.0, 2]),
    shuffle=st.booleans(),
    work=st.sampled_from([{"steps": 3}, {"steps": None, "epochs": 2}]),
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5),
)
def test_whatever_the_options_and_sizes(
    optimizer, clip, decay, schedule, warmup, shuffle, work, sizes
):
    local = digits.local(
        batch=8, clip=clip, weight_decay=decay, schedule=schedule, warmup=warmup, shuffle=shuffle,
        **optimizer, **work,
    )  # fmt: skip
    ends = np.cumsum([0, *sizes])
    parts = [np.arange(a, b) for a, b in pairwise(ends)]
    assert_alike(digits.sites(parts), local)


def test_sites_of_one_size_need_no_trainer(alone, monkeypatch):
    sites = [Site(f"site-{i}", list(range(20 * i, 20 * i + 20))) for i in range(6)]
    local = digits.local(steps=5)
    run(True, sites, local)
    assert alone["trainer"] == 0
    monkeypatch.setattr(cohort, "BATCH_BYTES", 50_000)  # two sites; nobody of six is left alone
    run(True, sites, local)
    assert alone["trainer"] == 0
    run(False, sites, local)
    assert alone["trainer"] == 2 * 6 * 5


def test_one_without_data_one_alone_in_its_size_and_the_rest(alone):
    sites = [Site(f"site-{i}", list(range(8))) for i in range(3)]
    sites += [Site("empty", []), Site("large", list(range(200)))]
    local = digits.local(steps=None, epochs=1, batch=8)
    run(True, sites, local, rounds=1)
    assert alone["trainer"] == 200 // 8
    assert_alike(sites, local)


@pytest.mark.parametrize("strategy", [FedProx(mu=0.1), Scaffold()])
def test_methods_with_hooks_train_alone_bit_for_bit(strategy):
    (_, first), (_, second) = (
        run(together, iid(4), digits.local(steps=3), strategy) for together in (False, True)
    )
    assert all(torch.equal(second.tensors[n], t) for n, t in first.tensors.items())


class Endless(digits.Digits):
    """Image 3 has an endless loss."""

    def loss(self, model, micro_batch, denominators):
        output = super().loss(model, micro_batch, denominators)
        factor = torch.where((micro_batch == 3).any(), math.inf, 1.0)
        return type(output)(output.loss * factor)


def test_a_site_whose_loss_is_not_finite_trains_alone_and_is_named(alone):
    options = digits.local(steps=6, batch=4).options
    local = LocalTraining(Endless(), options)
    sites = [Site(f"site-{i}", list(range(4 * i, 4 * i + 4))) for i in range(4)]
    _, other = assert_alike(sites, local, rounds=1, strict=False)
    assert alone["trainer"] == 3 * 6 + 2 * 5  # five steps until it diverges, on both sides
    assert other.incidents


class Net(nn.Module):
    """A perceptron with something between its layers."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(64, 16), between, nn.Linear(16, 10))

    def forward(self, pixels):
        return self.layers(pixels)


@pytest.mark.parametrize("between", [nn.Dropout(0.5), nn.BatchNorm1d(16)])
def test_models_that_draw_or_remember_train_alone(between, alone):
    sites, local = iid(3), digits.local(steps=2)
    (_, first), (_, second) = (
        run(together, sites, local, model=Net(between)) for together in (False, True)
    )
    assert alone["trainer"] == 2 * 2 * 3 * 2
    assert all(torch.equal(second.tensors[n], t) for n, t in first.tensors.items())


def test_frozen_weights_stay_and_the_model_is_as_it_was():
    model = digits.perceptron()
    model[0].requires_grad_(False)
    model.eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    _, server = run(True, iid(3), digits.local(steps=2), model=model)
    assert set(server.tensors) == {"2.weight", "2.bias"}
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_failing_client_fails_as_alone():
    class Failing(digits.Digits):
        def prepare(self, items):
            if 0 in items:
                raise digits.MissingExtra("nothing", "train")
            return super().prepare(items)

    local = LocalTraining(Failing(), TrainOptions(**digits.local(steps=2).options.model_dump()))
    _, other = assert_alike(iid(4), local, strict=False)
    assert other.incidents


def test_sites_that_train_twice_in_a_task():
    class Twice(FedAvg):
        def client(self, local):
            once = super().client(local)

            class Client(type(once)):
                def run(self, ctx, kind, payload):
                    first = self.local.run(ctx, payload).tensors
                    return super().run(ctx, kind, first)

            return Client(local, self.upload)

    assert_alike(iid(4), digits.local(steps=2), Twice())
