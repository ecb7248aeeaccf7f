"""Options of a job, sought by successive halving over rounds.

A trial is a job in a folder of its own, ``trials/<number>``, run to a rung's rounds, paused, and
gone on with from its snapshot if it is among the best. ``search.json`` holds all scores; a search
that was cut off goes on with the trial that it was at. The best trial's folder is that of a
finished ``anabranch federate``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from anabranch.errors import ConfigurationError
from anabranch.federated.errors import FederationError
from anabranch.federated.job import FederateJob, load_job
from anabranch.federated.randomness import generator
from anabranch.federated.running import claim, deal_out, federate, make_federation, run_or_resume
from anabranch.files import write_json
from anabranch.models.progress import Progress, silent
from anabranch.planning import Rung, successive_halving, survivors
from anabranch.training.errors import TrainingError
from anabranch.training.recipe_file import difference, parse_yaml
from anabranch.training.run_record import read_json

TABLE = "search.json"
METRIC = "valid/loss"


@dataclass
class Trial:
    """Values of the varied keys, and the metric after each rung's rounds; lower is better.

    A trial that failed has an ``error`` and goes no further.
    """

    number: int
    values: Mapping[str, Any]
    scores: dict[int, float] = field(default_factory=dict)
    error: str = ""

    @property
    def overrides(self) -> list[str]:
        """What :func:`load_job` takes."""
        return [f"{key}={json.dumps(value)}" for key, value in self.values.items()]

    def score(self, rounds: int) -> float:
        """After so many rounds; NaN if it failed."""
        return math.nan if self.error else self.scores[rounds]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        scores = {str(rounds): score for rounds, score in self.scores.items()}
        return {"values": dict(self.values), "scores": scores, "error": self.error}


@dataclass(frozen=True)
class Search:
    """A finished search: what was tried, and the best of those that ran all rounds."""

    trials: Sequence[Trial]
    rungs: Sequence[Rung]
    best: Trial | None
    folder: Path
    metric: str

    @property
    def rounds(self) -> int:
        """Rounds that were run in all."""
        return sum(max(trial.scores, default=0) for trial in self.trials)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        best = self.best and {
            "trial": self.best.number,
            "values": dict(self.best.values),
            "score": self.best.score(self.rungs[-1].rounds),
            "output": str(trial_folder(self.folder, self.best)),
        }
        return {
            "metric": self.metric,
            "rungs": [vars(rung) for rung in self.rungs],
            "trials": [{"trial": trial.number, **trial.to_dict()} for trial in self.trials],
            "rounds": self.rounds,
            "best": best,
        }


def search(
    file: str | Path,
    vary: Sequence[str],
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    factor: int = 3,
    least: int = 1,
    trials: int | None = None,
    metric: str = METRIC,
    progress: Progress = silent,
) -> Search:
    """Search all combinations of ``vary`` (``key=value,value``), or ``trials`` drawn of them.

    Every combination is checked before anything is loaded. Raises :class:`ConfigurationError` for
    these, for a metric that the runs do not have, and if the folder holds another search.
    """
    job, tried, jobs = prepare(file, vary, overrides, trials)
    rungs = successive_halving(len(tried), job.schedule.rounds, factor, least)
    _remember(folder, job, tried, rungs, metric)

    alive = tried
    for number, rung in enumerate(rungs):
        last = rung is rungs[-1]
        for place, trial in enumerate(alive):
            if rung.rounds in trial.scores or trial.error:
                continue
            progress(f"trial {trial.number} to round {rung.rounds}", place / len(alive))
            where = trial_folder(folder, trial)
            try:
                found = _advance(jobs[trial.number], where, rung.rounds, last, progress)
                trial.scores[rung.rounds] = _metric(found, metric)
            except ConfigurationError:
                raise
            except (FederationError, TrainingError) as error:
                trial.error = str(error)
            _store(folder, tried)
        scores = [trial.score(rung.rounds) for trial in alive]
        keep = 1 if last else rungs[number + 1].trials
        alive = [alive[index] for index in survivors(scores, keep)]
    best = next((trial for trial in alive if not trial.error), None)
    return Search(tried, rungs, best, folder, metric)


def prepare(
    file: str | Path, vary: Sequence[str], overrides: Sequence[str], trials: int | None
) -> tuple[FederateJob, list[Trial], list[FederateJob]]:
    """The job, the trials, and each one's own job. Every combination is checked."""
    job = load_job(file, overrides)
    values = combinations(vary)
    if trials is not None and trials < len(values):
        chosen = generator("search", job.seed).permutation(len(values))[:trials]
        values = [values[index] for index in sorted(chosen.tolist())]
    tried = [Trial(number, each) for number, each in enumerate(values)]
    return job, tried, [_load(file, [*overrides, *trial.overrides], job) for trial in tried]


def combinations(vary: Sequence[str]) -> list[dict[str, Any]]:
    """All of ``["a=1,2", "b=x,y"]``, the last key's values changing fastest."""
    axes: dict[str, list[Any]] = {}
    for text in vary:
        key, separator, given = text.partition("=")
        if not separator or not key.strip() or not given.strip():
            raise ConfigurationError(f"{text!r} is not KEY=VALUE,VALUE, such as seed=0,1,2")
        if key.strip() in axes:
            raise ConfigurationError(f"{key.strip()} is varied twice; list its values together")
        axes[key.strip()] = parse_yaml(f"value: [{given}]", text)["value"]
    if not axes:
        raise ConfigurationError("nothing is varied; give a key and its values")
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def trial_folder(folder: Path, trial: Trial) -> Path:
    """Where a trial runs."""
    return folder / "trials" / f"{trial.number:03d}"


def _load(file: str | Path, overrides: Iterable[str], job: FederateJob) -> FederateJob:
    made = load_job(file, overrides)
    if made.schedule.rounds != job.schedule.rounds:
        raise ConfigurationError("schedule.rounds cannot be varied: trials share their rungs")
    if made.runtime == "flower" or made.publish is not None:
        raise ConfigurationError("a search runs where it can pause: not on Flower, nor published")
    return made.model_copy(update={"evaluate_every": 1})


def _advance(
    job: FederateJob, folder: Path, rounds: int, last: bool, progress: Progress
) -> Mapping[str, float]:
    """Figures of a trial at so many rounds; the last rung ends as ``federate`` does."""
    if last:
        return federate(job, folder, progress).result.metrics
    claim(folder, job)
    federation = make_federation(job, folder, deal_out(job, progress), progress, until=rounds)
    return run_or_resume(federation, folder).history[rounds - 1]


def _metric(figures: Mapping[str, float], metric: str) -> float:
    if metric not in figures:
        hint = "; give data.split.valid a share" if metric.startswith("valid/") else ""
        raise ConfigurationError(
            f"the trials have no figure {metric!r}{hint}; they have {', '.join(figures)}"
        )
    score = figures[metric]
    if not math.isfinite(score):
        raise FederationError(f"{metric} is {score}")
    return score


def _remember(
    folder: Path, job: FederateJob, tried: Sequence[Trial], rungs: Sequence[Rung], metric: str
) -> None:
    """The folder is new, or holds this search, whose scores are then taken over."""
    what = {
        "job": job.resolved(),
        "values": [dict(trial.values) for trial in tried],
        "rungs": [vars(rung) for rung in rungs],
        "metric": metric,
    }
    path = folder / TABLE
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ConfigurationError(f"{folder} is not empty and holds no search; choose another")
        write_json(path, {"what": what, "trials": [trial.to_dict() for trial in tried]})
        return
    stored = read_json(path)
    if changed := difference(stored["what"], json.loads(json.dumps(what))):
        raise ConfigurationError(
            f"{folder} holds another search; choose another folder. {'; '.join(changed)}"
        )
    for trial, kept in zip(tried, stored["trials"], strict=True):
        trial.scores = {int(rounds): score for rounds, score in kept["scores"].items()}
        trial.error = kept["error"]


def _store(folder: Path, tried: Sequence[Trial]) -> None:
    stored = read_json(folder / TABLE)
    write_json(folder / TABLE, {**stored, "trials": [trial.to_dict() for trial in tried]})
