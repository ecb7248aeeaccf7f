"""PONITA, EGNN and peers on charged particles: time of a step, and error after equal time.

    python -m benchmarks.geometry [--seconds 60] [--peers egnn-pytorch,e3nn] [--json FILE]
    python -m benchmarks.geometry --long 3600 --folder DIR [--size full|small] [--json FILE]

The first form measures processor milliseconds of a training step (batches of 100 systems of five
particles, sides alternate), then trains each side for as many processor seconds and measures it on
2,000 other systems. ``--peers`` adds networks of the layers of egnn-pytorch and e3nn, which get
environments of their own below the cache, the same systems and as many seconds; one that cannot be
built or run is named with its reason.

The second form is the benchmark's own setting (3,000 systems; ``full`` is the authors' network) for
a stated budget, with checkpoints every minute or so: killed, it goes on where it was. It prints the
curve of validation error against processor seconds. One thread everywhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anabranch.claims.base import machine
from anabranch.models.geometry import (
    EGNN,
    EGNNConfig,
    Ponita,
    PonitaConfig,
    charged_nbody,
    linear_motion,
    nbody,
)
from anabranch.training.point_clouds import PointCloudRegression, Sample, batched, preset
from anabranch.training.point_clouds.forecasting import forecast_options, mean_squared_error, train
from anabranch.training.randomness import seed_all
from anabranch.training.trainer import Trainer
from benchmarks.peers.asking import PeerFailed, ask
from benchmarks.peers.environments import TORCH, EnvironmentFailed, Recipe

PEERS = {
    "egnn-pytorch": Recipe("egnn-pytorch", (*TORCH, "egnn-pytorch==0.2.8")),
    "e3nn": Recipe("e3nn", (*TORCH, "e3nn==0.6.0", "numpy")),
}

FEATURES: dict[str, Any] = {"scalars_in": 2, "vectors_in": 2, "scalars_out": 0}
SMALL: dict[str, Any] = {
    "orientations": 12,
    "grid": "fibonacci",
    "width": 32,
    "basis": 32,
    "layers": 3,
    "layer_scale": 0.1,
}
SIDES: dict[str, Callable[[], Any]] = {
    "ponita, width 32": lambda: Ponita(PonitaConfig(**FEATURES, **SMALL, vectors_out=1)),
    "ponita, full": lambda: Ponita(preset("nbody").model(**FEATURES)),
    "egnn": lambda: EGNN(EGNNConfig(**FEATURES)),
}
RATES = {"ponita, width 32": 4e-3, "ponita, full": 1e-3, "egnn": 2e-3}
BATCH, STEPS, WARM_UP = 100, 8, 2
TRAINED, TESTED = 1000, 2000
POINTS_OF_CURVE = 10
PEER_SECONDS = 600
"""Beside ten times its budget, to start and to test."""
PUBLISHED = 0.0043


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    found = long_run(options) if options.long else comparison(options)
    if options.json:
        report = {"machine": machine(), "options": vars(options), **found}
        options.json.write_text(json.dumps(report, indent=2, default=str) + "\n")


def comparison(options: argparse.Namespace) -> dict[str, Any]:
    systems, others = charged_nbody(TRAINED, 0), charged_nbody(TESTED, nbody.POOL_SEED)
    samples, test = systems.samples(), others.samples()
    cells = {name: {"milliseconds_a_step": cost} for name, cost in step_times(samples).items()}
    for name in SIDES:
        cells[name]["parameters"] = SIDES[name]().num_parameters()
    for name, seconds in {n: options.seconds for n in SIDES if n != "ponita, full"}.items():
        seed_all(0)
        model = SIDES[name]()
        went = train(model, samples, forecast_options(batch=BATCH, lr=RATES[name]), seconds=seconds)
        cells[name] |= {"steps": went.steps, "mse": mean_squared_error(model, test)}
        print(_line(name, cells[name]))
    print(_line("ponita, full", cells["ponita, full"]))
    for name in options.peers:
        try:
            cells[name] = peer(name, systems, others, options.seconds)
        except (EnvironmentFailed, PeerFailed) as failure:
            cells[name] = {"missing": str(failure)}
        print(_line(name, cells[name]))
    print(f"straight lines: mse {linear_motion(others)[1]:.5f}")
    return {"sides": cells}


def step_times(samples: list[Sample]) -> dict[str, float]:
    """Median processor milliseconds; the sides take turns, so that noise meets all."""
    trainers = {}
    for name, make in SIDES.items():
        seed_all(0)
        model = make()
        if isinstance(model, Ponita):
            model.calibrate(batched(samples[:BATCH]).cloud)
        options = forecast_options(steps=STEPS + WARM_UP, batch=BATCH)
        trainers[name] = Trainer(model, PointCloudRegression(), options, samples)
    costs: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(STEPS + WARM_UP):
        for name, trainer in trainers.items():
            began = time.process_time()
            trainer.step(trainer.next_items())
            costs[name].append(time.process_time() - began)
    return {name: statistics.median(cost[WARM_UP:]) * 1e3 for name, cost in costs.items()}


def peer(name: str, systems: Any, others: Any, seconds: float) -> dict[str, Any]:
    """The peer's figures, from its own environment."""
    python = PEERS[name].build()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "systems.npz"
        kinds = ("charges", "positions", "velocities", "targets")
        arrays = {kind: getattr(systems, kind).numpy() for kind in kinds}
        arrays |= {f"test_{kind}": getattr(others, kind).numpy() for kind in kinds}
        np.savez(path, **arrays)
        script = Path(__file__).with_name("geometry_peer.py")
        settings = (name, path, seconds, BATCH, RATES["egnn"])
        answer: dict[str, Any] = ask(
            python, script, *settings, folder=Path(folder), seconds=PEER_SECONDS + 10 * seconds
        )
    return answer


def long_run(options: argparse.Namespace) -> dict[str, Any]:
    """The benchmark's setting for a budget, resumed if it was interrupted."""
    seed = nbody.POOL_SEED
    samples = charged_nbody(nbody.TRAIN, seed).samples()
    validation = charged_nbody(nbody.VALIDATION, seed + 1).samples()
    test = charged_nbody(nbody.TEST, seed + 2).samples()
    full = options.size == "full"
    seed_all(0)
    model = SIDES["ponita, full" if full else "ponita, width 32"]()
    training = forecast_options(
        batch=BATCH if full else 25, lr=1e-3 if full else 4e-3, checkpoint={"every": 50}
    )
    went = train(
        model,
        samples,
        training,
        seconds=options.long,
        held_out=validation,
        points_of_curve=POINTS_OF_CURVE,
        output=options.folder,
        progress=lambda message, fraction: print(f"\r{message}", end="", file=sys.stderr),
    )
    model.save_pretrained(options.folder / "network")
    error = mean_squared_error(model, test)
    epochs = went.steps * training.batch / nbody.TRAIN
    for seconds, mse in went.curve:
        print(f"{seconds:8.1f} s  validation mse {mse:.5f}")
    print(
        f"{model.num_parameters():,} parameters, {went.steps:,} steps = {epochs:.1f} epochs in "
        f"{went.seconds:.0f} processor seconds: test mse {error:.5f} (published {PUBLISHED}, after "
        f"{preset('nbody').epochs:,} epochs)"
    )
    return {"curve": went.curve, "steps": went.steps, "epochs": epochs, "test_mse": error}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.geometry",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="processor time of a training")
    parser.add_argument(
        "--peers",
        type=lambda text: [p for p in text.split(",") if p],
        default=[],
        help=f"of {', '.join(PEERS)}, each in its own environment",
    )
    parser.add_argument("--long", type=float, metavar="SECONDS", help="train this long instead")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--folder", type=Path, help="checkpoints of --long")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if (options.long is None) != (options.folder is None):
        parser.error("--long and --folder belong together")
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"no peer {', '.join(sorted(unknown))}; known: {', '.join(PEERS)}")
    return options


def _line(name: str, cell: dict[str, Any]) -> str:
    shown = {
        key: f"{value:.4g}" if isinstance(value, float) else value for key, value in cell.items()
    }
    return f"{name}: " + "  ".join(f"{key} {value}" for key, value in shown.items())


if __name__ == "__main__":
    main()
