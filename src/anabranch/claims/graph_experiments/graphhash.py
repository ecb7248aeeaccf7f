"""Matrix factorisation on tables of equal size whose rows are shared in different ways."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from anabranch.claims.base import Measurement
from anabranch.evaluation.plotting import Plot
from anabranch.graphs.recommend import (
    Interactions,
    MatrixFactorization,
    Popularity,
    RecommendError,
)
from anabranch.graphs.recommend.data import (
    amazon_electronics,
    movielens_100k,
    planted_interactions,
)
from anabranch.graphs.recommend.hashing import (
    LSH,
    DoubleFrequency,
    DoubleGraphHash,
    DoubleHash,
    Frequency,
    GraphHash,
    IdMapper,
    Modulo,
)
from anabranch.models.progress import Progress, within

SEEDS = 2
BUDGET = 0.25
"""75 % fewer rows."""
FEW = 0.034
"""96.7 % fewer: about one row for each planted community and side."""
NEAR_FULL = 0.9
OTHER_SIZES = (0.1, 0.5)
"""Of the plot, beside BUDGET; one seed."""
TRAINING: dict[str, Any] = {"dim": 64, "lr": 5e-3, "l2": 1e-6, "batch": 2048, "epochs": 60}
VALIDATION: dict[str, Any] = {"evaluate_every": 4, "patience": 2}
GRAPH, DOUBLE_GRAPH = "GraphHash", "DoubleGraphHash"
Rows = tuple[int, int]
BASELINES: dict[str, Callable[[Rows, int], IdMapper]] = {
    "modulo": lambda rows, seed: Modulo(rows=rows, seed=seed),
    "frequency": lambda rows, seed: Frequency(rows=rows, seed=seed),
    "double hash": lambda rows, seed: DoubleHash(rows=rows, seed=seed),
    "double frequency": lambda rows, seed: DoubleFrequency(rows=rows, seed=seed),
    "locality-sensitive": lambda rows, seed: LSH(rows=rows, seed=seed),
}
Data = tuple[Interactions, Interactions]
"""What is trained on (and validated), and what is tested on."""


def measure(seed: int, progress: Progress) -> Measurement:
    """Every table at 75 % fewer rows on every data set, then fewer and more rows."""
    sets, missing = _sets()
    found: dict[str, dict[str, Any]] = {}
    for i, (name, make) in enumerate(sets.items()):
        stage = within(progress, 0.7 * i / len(sets), 0.7 * (i + 1) / len(sets))
        found[name] = _compare(make, BUDGET, list(BASELINES), seed, name, stage)
    planted, last = next(iter(sets)), list(sets)[min(1, len(sets) - 1)]
    some = ["modulo", "frequency"]
    stage = within(progress, 0.7, 0.85)
    few = _compare(sets[planted], FEW, some, seed, planted, stage, variants=False)
    few["recall_at_20"]["full"] = found[planted]["recall_at_20"]["full"]
    curve = {BUDGET: found[last]["recall_at_20"]}
    for i, size in enumerate(OTHER_SIZES):
        stage = within(progress, 0.85 + 0.15 * i / len(OTHER_SIZES), 1.0)
        other = _compare(sets[last], size, some, seed, last, stage, seeds=1, variants=False)
        curve[size] = other["recall_at_20"]
    curve = dict(sorted(curve.items()))
    above = {name: _above(result["recall_at_20"]) for name, result in found.items()}
    little = few["recall_at_20"]
    return Measurement(
        figures={
            "at_75_percent_fewer_rows": found,
            "times_the_best_baseline": {
                name: round(_times_best(result["recall_at_20"]), 2)
                for name, result in found.items()
            },
            "planted_at_96_7_percent_fewer": few,
            f"{last}_by_share_of_rows": {str(size): recall for size, recall in curve.items()},
            "missing": missing,
        },
        holds=all(above.values())
        and _above(little)
        and little[GRAPH] >= NEAR_FULL * little["full"]
        and not missing,
        seeds=tuple(range(seed, seed + SEEDS)),
        note="Recall@20 with the denominator capped at 20, mean over seeds, each at its best "
        "validation. Frequency hashing gives half of its rows to the commonest ids: where few "
        "items hold most interactions, as in small real sets, that is hard to beat. "
        "DoubleGraphHash is a variant of the method and decides nothing. Clusters are found "
        "once, with the resolution search; seconds are processor seconds.",
        plots=(_plot(last, curve),),
    )


def _sets() -> tuple[dict[str, Callable[[int], Data]], dict[str, str]]:
    """The data sets that are there, the planted one first, and why others are not."""
    sets: dict[str, Callable[[int], Data]] = {
        "planted": lambda seed: planted_interactions(3000, 3000, 100, seed=seed).split(seed=seed)
    }
    missing = {}
    for name, make in {
        "movielens": _movielens,
        "amazon": lambda seed: amazon_electronics(),
    }.items():
        try:
            make(0)
            sets[name] = make
        except RecommendError as reason:
            missing[name] = str(reason)
    return sets, missing


def _movielens(seed: int) -> Data:
    return movielens_100k().rated_at_least(4).compact().split(seed=seed)


def _compare(
    make: Callable[[int], Data],
    budget: float,
    baselines: list[str],
    seed: int,
    name: str,
    progress: Progress,
    *,
    seeds: int | None = None,
    variants: bool = True,
) -> dict[str, Any]:
    """Mean recall of every table; the tables of a seed have the rows that GraphHash has.

    ``variants``: also the double GraphHash, the full table and popularity.
    """
    recall: dict[str, list[float]] = {}
    reductions, seconds, training = [], [], []
    seeds = seeds or SEEDS
    for s in range(seed, seed + seeds):
        train, test = make(s)
        train, validation = train.split("random", 0.1, s, "validation")
        began = time.process_time()
        with warnings.catch_warnings():
            # Ids that only held-out interactions have share rows in every table alike.
            warnings.filterwarnings("ignore", ".* no interaction")
            graph = GraphHash(budget=budget, merge_isolated=True, seed=s).fit(train)
            seconds.append(time.process_time() - began)
            reductions.append(graph.reduction_)
            rows = graph.num_rows_
            mappers: dict[str, IdMapper | None] = {
                # Its resolution is known: the recommender need not search it again.
                GRAPH: GraphHash(resolution=graph.resolution_, merge_isolated=True, seed=s),
                **{n: BASELINES[n](rows, s) for n in baselines},
            }
            if variants:
                double = DoubleGraphHash(resolution=graph.resolution_, merge_isolated=True, seed=s)
                mappers |= {DOUBLE_GRAPH: double, "full": None}
            for i, (table, mapper) in enumerate(mappers.items()):
                done = (s - seed + i / len(mappers)) / seeds
                progress(f"{table} on {name} at {budget:.1%} of the rows", done)
                model = MatrixFactorization(**TRAINING, **VALIDATION, mapper=mapper, seed=s)
                model.fit(train, validation=validation)
                training.append(model.processor_seconds_)
                found = model.evaluate(test, denominator="capped").recall
                recall.setdefault(table, []).append(found)
            if not variants:
                continue
            popular = Popularity().fit(train, validation=validation)
            found = popular.evaluate(test, denominator="capped").recall
            recall.setdefault("popularity", []).append(found)
    return {
        "recall_at_20": {n: round(float(np.mean(values)), 4) for n, values in recall.items()},
        "rows_saved": round(float(np.mean(reductions)), 4),
        "processor_seconds": {
            "clustering": round(float(np.mean(seconds)), 2),
            "training": round(float(np.mean(training)), 2),
        },
    }


def _above(recall: dict[str, float]) -> bool:
    """Whether GraphHash is above every baseline of equal size."""
    return _times_best(recall) > 1


def _times_best(recall: dict[str, float]) -> float:
    return recall[GRAPH] / max(value for name, value in recall.items() if name in BASELINES)


def _plot(name: str, curve: dict[float, dict[str, float]]) -> Plot:
    tables = (GRAPH, "frequency", "modulo")
    return Plot(
        f"Recall by size of the tables ({name})",
        "share of the rows that are left",
        "recall@20, capped",
        {table: [(budget, recall[table]) for budget, recall in curve.items()] for table in tables},
        levels={"full": curve[BUDGET]["full"]},
    )
