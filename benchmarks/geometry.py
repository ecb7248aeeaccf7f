"""PONITA, EGNN and a peer on charged particles: time of a step, and error after equal time.

    python -m benchmarks.geometry [--seconds 60] [--peer] [--json FILE]
    python -m benchmarks.geometry --long 3600 --folder DIR [--size full|small] [--json FILE]

The first form measures processor milliseconds of a training step (batches of 100 systems of five
particles, sides alternate), then trains each side for as many processor seconds and measures it on
2,000 other systems. ``--peer`` adds the EGNN layers of the package egnn-pytorch, which get an
environment of their own below the cache: its layers know no velocities, so that our driver adds
``x + phi(h) v`` after each, as the paper does.

The second form is the benchmark's own setting (3,000 systems; ``full`` is the authors' network) for
a stated budget, with checkpoints every minute or so: killed, it goes on where it was. It prints the
curve of validation error against processor seconds. One thread everywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
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
from benchmarks.peers.environments import TORCH, EnvironmentFailed, Recipe

PEER = Recipe("egnn-pytorch", (*TORCH, "egnn-pytorch==0.2.8"))

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
PUBLISHED = 0.0043

DRIVER = """
import json, statistics, sys, time
import numpy as np, torch
from egnn_pytorch import EGNN
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
path, seconds, batch, rate, steps, warm_up = sys.argv[1], *map(float, sys.argv[2:])
data = {k: torch.from_numpy(v) for k, v in np.load(path).items()}

class Network(nn.Module):
    def __init__(self, width=64, layers=4):
        super().__init__()
        self.start = nn.Linear(2, width)
        self.layers = nn.ModuleList(
            EGNN(width, edge_dim=1, m_dim=width, norm_feats=True, norm_coors=True)
            for _ in range(layers)
        )
        self.along = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
            for _ in range(layers)
        )

    def forward(self, charges, x, v):
        h = self.start(torch.stack([charges, v.norm(dim=-1)], dim=-1))
        edges = (charges[:, :, None] * charges[:, None, :]).unsqueeze(-1)
        for layer, along in zip(self.layers, self.along):
            h, x = layer(h, x, edges=edges)
            x = x + along(h) * v
        return x

model = Network()
optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-10, fused=True)
n = len(data["charges"])
spent, costs, order = 0.0, [], torch.randperm(n)
while spent < seconds:
    began = time.process_time()
    if len(order) < batch:
        order = torch.randperm(n)
    rows, order = order[: int(batch)], order[int(batch):]
    q, _ = torch.linalg.qr(torch.randn(len(rows), 3, 3))
    x, v, y = (data[k][rows] @ q for k in ("positions", "velocities", "targets"))
    factor = 0.5 * (1 + np.cos(np.pi * min(1.0, spent / seconds)))
    for group in optimizer.param_groups:
        group["lr"] = rate * factor
    loss = (model(data["charges"][rows], x, v) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    cost = time.process_time() - began
    spent += cost
    costs.append(cost)
with torch.no_grad():
    parts = zip(*(data["test_" + k].split(200) for k in ("charges", "positions", "velocities")))
    found = torch.cat([model(*part) for part in parts])
print(json.dumps({
    "parameters": sum(p.numel() for p in model.parameters()),
    "milliseconds_a_step": statistics.median(costs[int(warm_up):]) * 1e3,
    "steps": len(costs),
    "mse": float((found - data["test_targets"]).square().mean()),
}))
"""


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
    if options.peer:
        try:
            cells["egnn-pytorch"] = peer(systems, others, options.seconds)
            print(_line("egnn-pytorch", cells["egnn-pytorch"]))
        except (EnvironmentFailed, subprocess.CalledProcessError) as failure:
            cells["egnn-pytorch"] = {"missing": str(failure)}
            print(f"egnn-pytorch is missing: {failure}", file=sys.stderr)
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


def peer(systems: Any, others: Any, seconds: float) -> dict[str, Any]:
    """The peer's figures, from its own environment."""
    python = PEER.build()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "systems.npz"
        kinds = ("charges", "positions", "velocities", "targets")
        arrays = {kind: getattr(systems, kind).numpy() for kind in kinds}
        arrays |= {f"test_{kind}": getattr(others, kind).numpy() for kind in kinds}
        np.savez(path, **arrays)
        settings = (seconds, BATCH, RATES["egnn"], STEPS, WARM_UP)
        ran = subprocess.run(
            [python, "-c", DRIVER, path, *map(str, settings)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    return json.loads(ran.stdout)


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
    parser.add_argument("--peer", action="store_true", help="also egnn-pytorch, in its environment")
    parser.add_argument("--long", type=float, metavar="SECONDS", help="train this long instead")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--folder", type=Path, help="checkpoints of --long")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if (options.long is None) != (options.folder is None):
        parser.error("--long and --folder belong together")
    return options


def _line(name: str, cell: dict[str, Any]) -> str:
    shown = {
        key: f"{value:.4g}" if isinstance(value, float) else value for key, value in cell.items()
    }
    return f"{name}: " + "  ".join(f"{key} {value}" for key, value in shown.items())


if __name__ == "__main__":
    main()
