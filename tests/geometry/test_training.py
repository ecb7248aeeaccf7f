"""Training through the shared trainer: loss, resumption, budget."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from anabranch.models.geometry import (
    EGNN,
    EGNNConfig,
    PointCloud,
    Ponita,
    PonitaConfig,
)
from anabranch.training.errors import DataError, TrainingError
from anabranch.training.point_clouds import PointCloudRegression, ProcessorBudget, Sample, batched
from anabranch.training.point_clouds.forecasting import (
    forecast_options,
    mean_squared_error,
    predict,
    train,
)
from anabranch.training.trainer import Trainer
from tests.geometry.clouds import cloud_of


def samples(count: int = 24, seed: int = 0) -> list[Sample]:
    """Clouds of different sizes whose answer is a vector that a network can learn."""
    found = []
    for number in range(count):
        cloud = cloud_of((3 + number % 3,), seed=seed + number, dtype=torch.float32)
        assert cloud.vectors is not None
        found.append(Sample(cloud, 0.5 * cloud.vectors[:, :1] - cloud.pos.unsqueeze(1) * 0.1))
    return found


def small(seed: int = 0, **changes: Any) -> Ponita:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"width": 8, "basis": 8, "layers": 2, "orientations": 12}
    features = {"scalars_in": 2, "vectors_in": 2, "scalars_out": 0, "vectors_out": 1}
    return Ponita(PonitaConfig(**{**sizes, **features, **changes}))


def small_egnn() -> EGNN:
    torch.manual_seed(0)
    return EGNN(EGNNConfig(scalars_in=2, vectors_in=2, width=8, layers=2))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("make", [small, small_egnn])
def test_a_network_learns(make: Any) -> None:
    model, data = make(), samples()
    before = mean_squared_error(model, data)
    train(model, data, forecast_options(steps=60, batch=8, lr=1e-2))
    assert mean_squared_error(model, data) < 0.3 * before


def test_the_step_does_not_depend_on_how_it_is_cut() -> None:
    """One pass or many: the same loss, gradient norm and weights."""
    data = samples(12)
    found = []
    for points in (4, 13, 10_000):
        model = small()
        model.calibrate(batched(data).cloud)
        objective = PointCloudRegression(turn=False, points=points)
        trainer = Trainer(model, objective, forecast_options(steps=5, batch=12, lr=1e-2), data)
        trainer.step(data)
        report = trainer.step(data)
        found.append((report.loss, report.grad_norm, report.metrics["mse"]))
        assert report.tokens == sum(item.cloud.num_points for item in data)
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)


def test_the_metric_is_the_mean_over_all_coordinates() -> None:
    data, model = samples(7), small().eval()
    trainer = Trainer(model, PointCloudRegression(points=9), forecast_options(steps=1), data)
    whole = batched(data)
    with torch.no_grad():
        expected = float((model(whole.cloud).vectors - whole.target).square().mean())
    found = trainer.evaluate(data)
    assert found["mse"] == pytest.approx(expected, rel=1e-5)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert mean_squared_error(model, data) == pytest.approx(expected, rel=1e-5)
    assert predict(model, data, at_once=2).shape == whole.target.shape


def test_turning_turns_cloud_and_target_alike_and_only_in_training() -> None:
    objective = PointCloudRegression()
    whole = batched(samples(5))
    turned = objective._turned(whole)
    assert whole.cloud.vectors is not None
    assert turned.cloud.vectors is not None
    expected = 0.5 * turned.cloud.vectors[:, :1] - turned.cloud.pos.unsqueeze(1) * 0.1
    assert torch.allclose(turned.target, expected, atol=1e-5)
    assert not torch.allclose(turned.target, whole.target, atol=1e-2)
    model, figures = small(layer_scale=0.0), {"numbers": 1.0}
    losses = {  # without layer scale: an untrained network is hardly more than its exact read-out
        mode: {
            float(objective.loss(model.train(mode), whole, figures).loss.detach()) for _ in range(3)
        }
        for mode in (True, False)
    }
    assert len(losses[False]) == 1
    assert len(losses[True]) == 3
    scalars = PointCloudRegression("scalars")
    invariant = Sample(whole.cloud, torch.ones(whole.cloud.num_points, 1))
    assert torch.equal(scalars._turned(invariant).target, invariant.target)


def test_pooled_answers_are_trained() -> None:
    """One answer a cloud: the number of its points."""
    data = [Sample(s.cloud, torch.tensor([[float(s.cloud.num_points)]])) for s in samples(12)]
    model = small(scalars_out=1, vectors_out=0, pool="sum")
    trainer = Trainer(
        model, PointCloudRegression("scalars"), forecast_options(steps=60, batch=12, lr=1e-2), data
    )
    before = trainer.evaluate(data)["mse"]
    trainer.fit()
    assert trainer.evaluate(data)["mse"] < 0.2 * before


def test_a_stopped_run_ends_bit_for_bit_as_one_that_was_not(tmp_path: Path) -> None:
    data = samples()
    whole = small()
    train(whole, data, forecast_options(steps=12, batch=8, lr=1e-2))

    options = forecast_options(steps=12, batch=8, lr=1e-2, checkpoint={"every": 1})
    interrupted = small()
    interrupted.calibrate(batched(data[:8]).cloud)
    stopped = Trainer(interrupted, PointCloudRegression(), options, data, output=tmp_path)
    stopped.progress = lambda message, fraction: stopped.stop() if stopped.steps_done == 5 else None
    assert stopped.fit().stopped_because == "stopped"
    assert stopped.steps_done == 5

    torch.rand(7)  # whatever happened in between
    resumed = small(seed=3)
    went = train(resumed, data, options, output=tmp_path)
    assert went.steps == 12
    found = weights(resumed)
    for name, expected in weights(whole).items():
        assert torch.equal(found[name], expected), name


def test_a_budget_ends_the_run_and_the_schedule() -> None:
    model, data = small(), samples()
    rates = []
    trainer = Trainer(model, PointCloudRegression(), forecast_options(batch=8, lr=1e-2), data)
    trainer.progress = lambda message, fraction: rates.append(
        trainer.optimizer.param_groups[0]["lr"]
    )
    budget = ProcessorBudget(trainer, 1.0)
    began = time.process_time()
    trainer.fit()
    assert 1.0 <= budget.spent < 1.3
    assert budget.spent <= time.process_time() - began
    assert trainer.steps_done == trainer.total_steps > 20
    assert max(rates) > 5e-3
    assert rates[-1] < 1e-3, "the cosine reached its end"


def test_a_budget_is_not_spent_again_after_a_stop(tmp_path: Path) -> None:
    data = samples()
    options = forecast_options(batch=8, lr=1e-2)
    first = train(small(), data, options, seconds=0.5, output=tmp_path)
    again = train(small(), data, options, seconds=0.5, output=tmp_path)
    assert again == first
    longer = train(small(), data, options, seconds=0.8, output=tmp_path)
    assert longer.seconds >= 0.8
    assert longer.steps > first.steps


def test_a_curve_is_as_long_as_asked_and_costs_nothing() -> None:
    data = samples()
    went = train(
        small(), data, forecast_options(batch=8), seconds=0.6, held_out=data, points_of_curve=3
    )
    assert [round(seconds / 0.2) for seconds, _ in went.curve] == [1, 2, 3]
    assert went.curve[-1][1] < went.curve[0][1] * 1.5
    assert went.seconds < 0.8
    with pytest.raises(TrainingError, match="a curve needs a budget"):
        train(small(), data, forecast_options(steps=1), points_of_curve=3)
    with pytest.raises(TrainingError, match="no samples"):
        train(small(), [], forecast_options(steps=1))


def test_targets_that_do_not_fit_are_refused() -> None:
    cloud = samples(1)[0].cloud
    options = forecast_options(steps=1)
    for target, kind, message in (
        (torch.zeros(3, 1, 2), "vectors", r"sample 0 is \[3, 1, 2\], not \[3, channels, 3\]"),
        (torch.zeros(3, 3), "vectors", r"is \[3, 3\], not"),
        (torch.full((3, 1, 3), float("nan")), "vectors", "sample 0 is not finite"),
        (torch.zeros(2, 1), "scalars", r"\[2, 1\], not \[3 points or 1 clouds, channels\]"),
    ):
        objective = PointCloudRegression(kind)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=message):
            Trainer(small(), objective, options, [Sample(cloud, target)])
    two = Sample(cloud, torch.zeros(3, 2, 3))
    trainer = Trainer(small(), PointCloudRegression(), options, [two])
    with pytest.raises(DataError, match=r"gives vectors \[3, 1, 3\], the targets are \[3, 2, 3\]"):
        trainer.step([two])


def test_items_identify_a_run() -> None:
    objective, data = PointCloudRegression(), samples(3)
    assert objective.fingerprint(data) == objective.fingerprint(samples(3))
    moved = [Sample(data[0].cloud.shifted(torch.ones(3)), data[0].target), *data[1:]]
    assert objective.fingerprint(moved) != objective.fingerprint(data)
    assert objective.settings() != PointCloudRegression(turn=False).settings()
    assert PointCloud(data[0].cloud.pos, data[0].cloud.scalars).num_clouds == 1
