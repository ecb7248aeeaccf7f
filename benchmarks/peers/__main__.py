"""Anabranch and other engines on the same prompts, in turn.

    python -m benchmarks.peers [--peers vllm,transformers] [--cells chat,long] [--rounds 3]
                               [--json FILE]

Builds an environment for each peer that has none, starts every side, and lets them alternate: for
each round and cell, each side once, in an order that shifts by one from round to round. Greedy,
fixed lengths, ends ignored, no text: the time is the model's and the scheduler's. A peer that
cannot be installed or run is listed with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from anabranch import models
from anabranch.claims.base import machine
from anabranch.models.cache import root
from benchmarks.peers import cells as catalogue
from benchmarks.peers.adapters import random_adapters
from benchmarks.peers.cells import CELLS, Cell
from benchmarks.peers.environments import RECIPES, EnvironmentFailed
from benchmarks.peers.metrics import Metrics
from benchmarks.peers.process import Driver, DriverFailed
from benchmarks.peers.sides import Side, sides
from benchmarks.peers.table import show

TRIALS = 3

log = Console(stderr=True)


def main() -> None:
    options = arguments()
    # Leave through the context managers, or stopped drivers stay behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chosen = [s for s in sides(options.model) if s.recipe is None or s.recipe in options.peers]
    cells = [CELLS[name] for name in options.cells]

    unavailable: dict[str, str] = {}
    trials: dict[str, list[dict[str, Any]]] = {}
    described: dict[str, Any] = {}
    rounds: dict[Cell, dict[str, list[Metrics]]] = {}
    for adapters in sorted({cell.adapters for cell in cells}):
        group = [cell for cell in cells if cell.adapters == adapters]
        compared = chosen
        if adapters:
            folders = random_adapters(options.model, adapters)
            compared = [side.with_adapters(folders) for side in chosen if side.mixes_adapters]
        with ExitStack() as stack:
            drivers: dict[str, Driver] = {}
            failed: dict[str, str] = {}
            for side in compared:
                try:
                    drivers[side.name] = stack.enter_context(closing(choose(side, trials)))
                except (EnvironmentFailed, DriverFailed) as failure:
                    failed[side.name] = str(failure)
            rounds |= measure(drivers, group, options.rounds, failed)
            where = f" with {adapters} adapters" if adapters else ""
            described |= {name + where: driver.description for name, driver in drivers.items()}
            unavailable |= {name + where: reason for name, reason in failed.items()}

    medians = {
        cell: {name: Metrics.middle(measured) for name, measured in by_side.items()}
        for cell, by_side in rounds.items()
    }
    console = Console()
    show(medians, chosen[0].name, console)
    for name, reason in unavailable.items():
        console.print(f"[red]{name} is missing:[/] {reason}", highlight=False)
    if options.json:
        report = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "model": options.model,
            "rounds": options.rounds,
            "sides": described,
            "trials": trials,
            "unavailable": unavailable,
            "cells": [
                {
                    **dataclasses.asdict(cell),
                    "sides": {
                        name: {
                            "median": dataclasses.asdict(medians[cell][name]),
                            "rounds": [dataclasses.asdict(metrics) for metrics in measured],
                        }
                        for name, measured in by_side.items()
                    },
                }
                for cell, by_side in rounds.items()
            ],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if unavailable:
        sys.exit(1)


def arguments() -> argparse.Namespace:
    """The command line, with names checked."""

    def names(among: Sequence[str]) -> Any:
        def parse(text: str) -> list[str]:
            listed = [name for name in text.split(",") if name]
            if unknown := set(listed) - set(among):
                raise argparse.ArgumentTypeError(
                    f"{', '.join(sorted(unknown))}: choose from {', '.join(among)}"
                )
            return listed

        return parse

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=models.DEFAULT)
    parser.add_argument("--peers", type=names(list(RECIPES)), default=list(RECIPES))
    parser.add_argument("--cells", type=names(list(CELLS)), default=catalogue.DEFAULT)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def choose(side: Side, trials: dict[str, list[dict[str, Any]]]) -> Driver:
    """A driver of this side, warm, with the settings that are fastest here.

    Candidates alternate and the best of three counts: another program's burst decides nothing.
    """
    python = RECIPES[side.recipe].build() if side.recipe else Path(sys.executable)
    with ExitStack() as stack:
        candidates: list[Driver] = []
        for settings in side.settings:
            driver = stack.enter_context(closing(start(side, settings, python)))
            driver.measure(catalogue.WARM_UP, 0)
            candidates.append(driver)
        best = candidates[0]
        if len(candidates) > 1:
            speeds = dict.fromkeys(candidates, 0.0)
            for round_, driver in product(range(TRIALS), candidates):
                measured = driver.measure(catalogue.TRIAL, round_).tokens_per_second
                speeds[driver] = max(speeds[driver], measured)
            best = max(candidates, key=speeds.__getitem__)
            trials[side.name] = [{**d.description, "tokens_per_second": speeds[d]} for d in speeds]
            for driver, speed in speeds.items():
                settings = {k: v for k, v in driver.description.items() if k in side.settings[0]}
                log.print(f"[dim]trial, {side.name}, {settings}: {speed:.1f}")
        stack.pop_all()
        for driver in candidates:
            if driver is not best:
                driver.close()
    return best


def start(side: Side, settings: Mapping[str, Any], python: Path) -> Driver:
    """A driver whose log is beside the environments."""
    folder = root() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return Driver(side, settings, python, folder / f"{side.name}.driver.log")


def measure(
    drivers: dict[str, Driver], cells: Sequence[Cell], rounds: int, unavailable: dict[str, str]
) -> dict[Cell, dict[str, list[Metrics]]]:
    """Let the sides alternate. A side that fails is reported and left out from there on."""
    measured: dict[Cell, dict[str, list[Metrics]]] = {
        cell: {name: [] for name in drivers} for cell in cells
    }
    for round_ in range(1, rounds + 1):
        for cell in cells:
            names = [name for name in drivers if name not in unavailable]
            shift = round_ % max(len(names), 1)
            for name in names[shift:] + names[:shift]:
                try:
                    metrics = drivers[name].measure(cell, round_)
                except DriverFailed as failure:
                    unavailable[name] = f"failed at {cell.title()}: {failure}"
                    continue
                measured[cell][name].append(metrics)
                log.print(
                    f"[dim]round {round_}, {cell.name}, {name}: "
                    f"{metrics.tokens_per_second:.1f} tok/s"
                )
    return {
        cell: {name: found for name, found in by_side.items() if found}
        for cell, by_side in measured.items()
    }


if __name__ == "__main__":
    main()
