"""PONITA and EGNN on the same systems, for the same processor seconds, on one thread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from anabranch.claims.base import Measurement
from anabranch.evaluation.plotting import Plot
from anabranch.models.geometry import (
    EGNN,
    EGNNConfig,
    Ponita,
    PonitaConfig,
    charged_nbody,
    equivariance_error,
    error_by_angle,
    grid_symmetries,
    linear_motion,
    orientation_grid,
    random_rotations,
)
from anabranch.models.geometry.point_cloud import PointCloud
from anabranch.models.progress import Progress, within
from anabranch.training.point_clouds import batched
from anabranch.training.point_clouds.forecasting import (
    Forecast,
    forecast_options,
    mean_squared_error,
    train,
)
from anabranch.training.point_clouds.objective import Sample
from anabranch.training.randomness import seed_all

SEEDS = 2
SECONDS = 100.0
"""Processor time of each training."""
TRAIN, TEST, CHECKED = 1000, 1000, 2000
TEST_SEED = 1_000_000
"""Added to a seed: no test system is a training system of another seed."""
BATCHES = {"ponita": 25, "egnn": 50}
RATES = {"ponita": 4e-3, "egnn": 2e-3}
"""Chosen on seed 10, which the claim does not use, with 30 s a training."""
CURVE = 5
FEATURES: Mapping[str, Any] = {"scalars_in": 2, "vectors_in": 2}
PONITA: Mapping[str, Any] = {
    "orientations": 12,
    "grid": "fibonacci",
    "width": 32,
    "basis": 32,
    "layers": 3,
    "layer_scale": 0.1,
    "scalars_out": 0,
    "vectors_out": 1,
}
EGNN_SIZE: Mapping[str, Any] = {"width": 64, "layers": 4}

ROTATIONS, TURNED_CLOUDS = 20, 100
ANGLES = (0.0, 15.0, 30.0, 45.0, 60.0, 90.0, 120.0, 150.0, 180.0)
EXACT = {torch.float32: 1e-4, torch.float64: 1e-10}


@dataclass(frozen=True)
class Trained:
    """One network after its budget."""

    model: PreTrainedModel
    error: float
    forecast: Forecast


def measure(seed: int, progress: Progress) -> Measurement:
    """Generator, both trainings for each seed, then equivariance."""
    seeds = tuple(range(seed, seed + SEEDS))
    with one_thread():
        progress("simulating charged particles", 0.0)
        tau, line_error = linear_motion(charged_nbody(CHECKED, seed))
        runs = [
            compare(s, within(progress, 0.05 + 0.9 * i / SEEDS, 0.05 + 0.9 * (i + 1) / SEEDS))
            for i, s in enumerate(seeds)
        ]
        progress("equivariance", 0.95)
        trained = runs[0]["ponita"].model
        clouds = held_out(seed)[:TURNED_CLOUDS]
        turned = deviations(trained, clouds, seed)
        exact = exactness(seed)
        curve = by_angle(trained, clouds, seed)

    errors = {name: float(np.mean([run[name].error for run in runs])) for name in runs[0]}
    # EGNN overfits so few systems: its lowest test error on the way, as if stopped in time.
    best_egnn = float(np.mean([min(e for _, e in r["egnn"].forecast.curve) for r in runs]))
    line = float(np.mean([linear_motion(charged_nbody(TEST, s + TEST_SEED))[1] for s in seeds]))
    parts = {
        "error_against_egnn": errors["ponita"] <= 0.8 * errors["egnn"],
        "error_against_linear_motion": errors["ponita"] <= 0.15 * line,
        "generator": 0.70 <= tau <= 0.77 and 0.07 <= line_error <= 0.10,
        "exactness": all(
            value <= EXACT[dtype] for dtype, found in exact.items() for value in found.values()
        ),
    }
    return Measurement(
        figures={
            "test_mse": {
                **{name: round(error, 5) for name, error in errors.items()},
                "linear motion": round(line, 5),
            },
            "ponita_over_egnn": round(errors["ponita"] / errors["egnn"], 3),
            "ponita_over_egnn_at_its_best": round(errors["ponita"] / best_egnn, 3),
            "ponita_over_linear_motion": round(errors["ponita"] / line, 3),
            "test_mse_by_seed": [{name: round(run[name].error, 5) for name in run} for run in runs],
            "parameters": {n: t.model.num_parameters() for n, t in runs[0].items()},
            "processor_seconds": {
                n: [round(run[n].forecast.seconds, 1) for run in runs] for n in runs[0]
            },
            "steps": {n: [run[n].forecast.steps for run in runs] for n in runs[0]},
            "deviation_of_the_trained_ponita_under_random_rotations": turned,
            "largest_deviation_where_exact": {
                str(dtype).removeprefix("torch."): {k: float(f"{v:.1e}") for k, v in found.items()}
                for dtype, found in exact.items()
            },
            "generator": {"tau": round(tau, 3), "linear_mse": round(line_error, 4)},
            "parts_that_hold": parts,
        },
        holds=all(parts.values()),
        seeds=seeds,
        note=f"{TRAIN:,} systems to train on, {TEST:,} to test; {SECONDS:g} s of processor time a "
        f"training on one thread, random rotations; batches of {BATCHES}, peak rates {RATES}. The "
        "published figures are for 3,000 systems and 10,000 epochs. A grid is only approximately "
        "equivariant: the deviation is of predicted displacements, to be read beside their length.",
        plots=(_learning(runs), curve),
    )


def compare(seed: int, progress: Progress) -> dict[str, Trained]:
    """Train both on the systems of one seed."""
    samples, test = charged_nbody(TRAIN, seed).samples(), held_out(seed)
    found = {}
    for number, name in enumerate(("ponita", "egnn")):
        progress(f"seed {seed}: {name} for {SECONDS:g} s of processor time", number / 2)
        seed_all(seed)
        model = make(name)
        options = forecast_options(batch=BATCHES[name], lr=RATES[name], seed=seed)
        forecast = train(
            model, samples, options, seconds=SECONDS, held_out=test, points_of_curve=CURVE
        )
        found[name] = Trained(model, mean_squared_error(model, test), forecast)
    return found


def make(name: str) -> PreTrainedModel:
    """An untrained network."""
    if name == "ponita":
        return Ponita(PonitaConfig(**FEATURES, **PONITA))
    return EGNN(EGNNConfig(**FEATURES, **EGNN_SIZE))


def held_out(seed: int) -> list[Sample]:
    """Test systems."""
    return charged_nbody(TEST, seed + TEST_SEED).samples()


def deviations(model: PreTrainedModel, samples: list[Sample], seed: int) -> dict[str, float]:
    """Largest and mean, of single displacements, beside their mean length."""
    cloud = batched(samples).cloud
    generator = torch.Generator().manual_seed(seed)
    found = equivariance_error(model, cloud, random_rotations(ROTATIONS, 3, generator=generator))
    with torch.no_grad():
        length = model(cloud).vectors.norm(dim=-1).mean()
    return {
        "largest": round(found.vectors, 4),
        "mean": round(found.mean_vector, 4),
        "mean_length_of_a_prediction": round(float(length), 4),
    }


def exactness(seed: int) -> dict[torch.dtype, dict[str, float]]:
    """Largest deviations of untrained networks under rotations, reflections and permutations.

    On ten clouds of six normally distributed points.
    """
    found = {}
    for dtype in EXACT:
        generator = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, generator=generator, dtype=dtype)
        batch = torch.arange(10).repeat_interleave(6)
        given = PointCloud(draw(60, 3), draw(60, 2), draw(60, 2, 3), batch)
        scalars_only = PointCloud(given.pos, given.scalars, batch=given.batch)
        turns = random_rotations(5, 3, reflections=True, generator=generator, dtype=dtype)
        grid = _untrained(seed, dtype, orientations=12, grid="icosahedron")
        group = torch.from_numpy(grid_symmetries(orientation_grid(12), reflections=True))
        points = _untrained(seed, dtype, orientations=0, vectors_in=0, vectors_out=0)
        edges = _untrained(seed, dtype, orientations=-1)
        found[dtype] = {
            "positions only": equivariance_error(points, scalars_only, turns).largest,
            "edge mode": equivariance_error(edges, given, turns).largest,
            "grid turned along": equivariance_error(grid, given, turns, rotate_grid=True).largest,
            "the icosahedron's symmetries": equivariance_error(grid, given, group[::10]).largest,
            "permutation": _permuted(grid, given, seed),
        }
    return found


def by_angle(model: PreTrainedModel, samples: list[Sample], seed: int) -> Plot:
    """Mean and largest deviation against the angle, about random axes."""
    cloud = batched(samples[:20]).cloud
    axes = torch.nn.functional.normalize(
        torch.randn(10, 3, generator=torch.Generator().manual_seed(seed)), dim=-1
    )
    found = error_by_angle(model, cloud, ANGLES, axes)
    pairs = list(zip(ANGLES, found, strict=True))
    return Plot(
        "Deviation from equivariance after training",
        "degrees about random axes",
        "of a predicted displacement",
        {
            "largest": [(angle, round(d.vectors, 5)) for angle, d in pairs],
            "mean": [(angle, round(d.mean_vector, 5)) for angle, d in pairs],
        },
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Processor seconds then count the same work on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _untrained(seed: int, dtype: torch.dtype, **changes: Any) -> Ponita:
    """Without layer scale, so that the blocks count."""
    seed_all(seed)
    sizes = {"width": 16, "basis": 16, "layers": 2, "layer_scale": 0.0}
    outputs = {"scalars_out": 1, "vectors_out": 1}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # not .to(dtype) afterwards, which leaves the grid rounded
    try:
        return Ponita(PonitaConfig(**{**FEATURES, **sizes, **outputs, **changes}))
    finally:
        torch.set_default_dtype(before)


def _permuted(model: Ponita, cloud: PointCloud, seed: int) -> float:
    """Largest change of a point's output when points are given in another order."""
    order = torch.randperm(cloud.num_points, generator=torch.Generator().manual_seed(seed))
    assert cloud.vectors is not None
    shuffled = PointCloud(
        cloud.pos[order], cloud.scalars[order], cloud.vectors[order], cloud.batch[order]
    )
    with torch.no_grad():
        before, after = model(cloud), model(shuffled)
    return float((after.vectors - before.vectors[order]).abs().max())


def _learning(runs: list[dict[str, Trained]]) -> Plot:
    series = {name: runs[0][name].forecast.curve for name in runs[0]}
    return Plot("Test error while training", "processor seconds", "mean squared error", series)
