"""Losses in the output folder of a job that runs as a process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from anabranch.console.federations import read_run
from anabranch.console.jobs import Points
from anabranch.errors import AnabranchError

MOST_POINTS = 10_000


def read_curves(output: Path) -> tuple[str, Mapping[str, Points]]:
    """What the points lie over, and the curves by name: of a recipe or a federation.

    Empty where there is neither, or no loss yet. Raises :class:`AnabranchError` for a damaged file.
    """
    log = output / "training" / "metrics.jsonl"
    if log.is_file():
        return "step", _of_training(log)
    if (output / "job.json").is_file():
        run = read_run(output)
        if run.problem:
            raise AnabranchError(run.problem)
        return "round", run.curves([name for name in run.metrics if "loss" in name])
    return "step", {}


def _of_training(log: Path) -> Mapping[str, Points]:
    from anabranch.training.metrics_log import read_metrics  # its package knows torch

    training: list[tuple[float, float]] = []
    validation: list[tuple[float, float]] = []
    try:
        for entry in read_metrics(log):
            if (loss := entry.get("loss")) is not None:
                training.append((entry["step"], loss))
            if (loss := entry.get("validation", {}).get("loss")) is not None:
                validation.append((entry["step"], loss))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AnabranchError(f"{log.name}: {type(error).__name__}: {error}") from error
    found = {"training": _thinned(training), "validation": _thinned(validation)}
    return {name: points for name, points in found.items() if points}


def _thinned(points: Points) -> Points:
    """Every n-th, so that a page stays light."""
    return points[:: -(-len(points) // MOST_POINTS) or 1]
