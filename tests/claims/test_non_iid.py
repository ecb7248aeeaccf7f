"""What the claims on clients with different data read off a run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")

from anabranch.claims.federated_experiments import non_iid
from anabranch.evaluation.testbeds import digits
from anabranch.federated.scheduling import Uniform
from anabranch.federated.strategies import FedAvg


def test_objective_is_the_mean_over_clients_and_its_gradient() -> None:
    sites = non_iid.dirichlet(5, seed=10)
    model, (train, _) = digits.perceptron(1), digits.images()

    loss, norm = non_iid.objective(model, sites)

    expected = torch.stack(
        [F.cross_entropy(model(train.pixels[s.data]), train.labels[s.data]) for s in sites]
    ).mean()
    expected.backward()
    length = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert norm == pytest.approx(float(length), rel=1e-4)


def test_a_run_shows_every_version_and_its_last() -> None:
    sites = non_iid.dirichlet(5, seed=10)
    local = digits.local(lr=0.1, batch=8, steps=2)

    found = non_iid.run(FedAvg(), local, sites, 3, 10, Uniform(2))

    assert len(found.accuracies) == len(found.losses) == len(found.gradient_norms) == 3
    assert found.objective == found.losses[-1]
    assert found.settled_loss == pytest.approx(sum(found.losses) / 3)


def test_rounds_to_a_target_count_the_version_that_completes_the_mean() -> None:
    sites = non_iid.dirichlet(5, seed=10)
    ran = non_iid.run(FedAvg(), digits.local(steps=1), sites, 1, 10).result
    seen = non_iid.Outcome(ran, (0.2, 0.9, 0.4, 0.8), (1.0,) * 4, (3.0, 1.0, 2.0, 0.5))

    assert seen.rounds_to(0.9) == 2
    assert seen.rounds_to(0.65, smoothed=2) == 3
    assert seen.rounds_to(0.95) is None
    assert seen.rounds_to_gradient(1.0) == 2
    assert seen.rounds_to_gradient(1.5, smoothed=2) == 3
    assert seen.rounds_to_gradient(0.1) is None
    assert seen.rounds_to_gradient(9.0, smoothed=5) is None
