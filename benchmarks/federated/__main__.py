"""Rounds per second: our simulation against others', on the same federation of digits.

    python -m benchmarks.federated [--clients 100] [--steps 1] [--rounds 10] [--trials 3]
                                   [--peer flower|nvflare] [--json FILE]

Every client takes ``--steps`` SGD steps a round on its share of scikit-learn's digits, the server
averages. The peer gets an environment of its own (built once) and as many worker processes as this
process may use cores. We use one, with the sites one after the other and then as one batch
(``together``), and beside it as many as the peer with the runtime ``processes``. NVFlare starts a
process for each turn of a client if there are more clients than workers, so that rounds of a
hundred take ten minutes: choose few. The sides alternate; a side's figure is the median over all
rounds but the first of each trial, so that starting up counts for none.
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
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from anabranch.claims.base import machine
from anabranch.evaluation.testbeds import digits
from anabranch.federated import Federation, Simulation, Site, splits
from anabranch.federated.runtimes.base import Runtime
from anabranch.federated.runtimes.processes import Processes
from anabranch.federated.strategies import FedAvg
from benchmarks.peers.environments import TORCH, Recipe

SIMULATION, TOGETHER, PROCESSES = OURS = ("simulation", "together", "processes")
PEERS = {
    "flower": Recipe("flower", (*TORCH, "flwr[simulation]==1.41.0", "numpy")),
    "nvflare": Recipe("nvflare", (*TORCH, "nvflare==2.9.0", "numpy")),
}
"""Each has its driver beside this file, ``<name>_driver.py``."""


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    recipe = PEERS[options.peer]
    python = recipe.build()
    cores = len(os.sched_getaffinity(0))
    split = splits.iid(digits.TRAIN, options.clients)
    rounds: dict[str, list[float]] = {name: [] for name in (*OURS, options.peer)}
    accuracy: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.npz"
        write_job(job, split)
        for trial in range(options.trials):
            sides = [
                (SIMULATION, lambda: ours(split, options, Simulation)),
                (TOGETHER, lambda: ours(split, options, partial(Simulation, together=True))),
                (PROCESSES, lambda: ours(split, options, partial(Processes, workers=cores))),
                (options.peer, lambda: peer(python, job, options, cores)),
            ]
            for name, run in sides[:: -1 if trial % 2 else 1]:
                outcome = run()
                ended = outcome["ended"]
                rounds[name] += [b - a for a, b in pairwise(ended[1:])]
                accuracy[name] = outcome["accuracy"]
    rates = {name: 1 / statistics.median(seconds) for name, seconds in rounds.items()}
    ratios = {name: rates[name] / rates[options.peer] for name in OURS}
    for name, rate in rates.items():
        ratio = f"   {ratios[name]:.1f}x" if name in OURS else ""
        print(f"{name:10} {rate:8.2f} rounds/s   accuracy {accuracy[name]:.3f}{ratio}")
    if options.json:
        report = {
            "machine": machine(),
            "cores": cores,
            "peer": recipe.requirements[-2],
            "options": {k: v for k, v in vars(options).items() if k != "json"},
            "rounds_per_second": rates,
            "ratios": ratios,
            "accuracy": accuracy,
            "round_seconds": rounds,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.federated",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--peer", choices=[*PEERS], default="flower")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def write_job(path: Path, split: list[np.ndarray]) -> None:
    """Data and who owns what, for a process without our package."""
    train, test = digits.images()
    np.savez(
        path,
        pixels=train.pixels.numpy(),
        labels=train.labels.numpy(),
        test_pixels=test.pixels.numpy(),
        test_labels=test.labels.numpy(),
        indices=np.concatenate(split),
        owners=np.repeat(np.arange(len(split)), [len(part) for part in split]),
    )


def ours(
    split: list[np.ndarray],
    options: argparse.Namespace,
    runtime: Callable[[list[Site], nn.Module], Runtime],
) -> dict[str, Any]:
    model, sites = digits.perceptron(), digits.sites(split)
    method = FedAvg()
    ended = [time.perf_counter()]
    federation = Federation(
        method.begin(model),
        method.client(digits.local(steps=options.steps)),
        method.schedule(options.rounds),
        runtime(sites, model),
        watch=lambda _: ended.append(time.perf_counter()),
    )
    federation.run()
    return {"ended": ended, "accuracy": digits.watch(model)(federation.coordinator)["accuracy"]}


def peer(python: Path, job: Path, options: argparse.Namespace, cores: int) -> dict[str, Any]:
    driver = Path(__file__).with_name(f"{options.peer}_driver.py")
    command = list(map(str, [python, driver, job, options.rounds, options.steps, cores]))
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{options.peer} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    outcome: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    if set(outcome["averaged"]) != {options.clients}:
        print(f"{options.peer} averaged {outcome['averaged']} of {options.clients} clients")
    return outcome


if __name__ == "__main__":
    main()
