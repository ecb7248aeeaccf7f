"""Searches FastRP's weights and hub damping for what they are used for."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anabranch.errors import MissingExtra
from anabranch.graphs.convert import as_graph
from anabranch.graphs.embedding.fastrp import FastRP
from anabranch.graphs.errors import GraphError

BETA_STEP = 1 / 16
"""beta is searched on a grid: trials of one beta share the powers."""
_CACHED = 4
"""Grid points whose powers are held: two arrays [n, dim] each."""


@dataclass(frozen=True)
class Tuned:
    """``trials`` are (weight of the 4th power, beta, score) in the order they were tried."""

    weights: tuple[float, float, float, float]
    beta: float
    score: float
    trials: tuple[tuple[float, float, float], ...]


def tune(
    graph: Any,
    objective: Callable[[NDArray[np.float32]], float],
    *,
    trials: int = 20,
    dim: int = 64,
    seed: int = 0,
) -> Tuned:
    """The weights (0, 0, 1, w) and beta for which ``objective(embedding)`` is largest.

    The paper's search (section 4.3): w in [1, 64] on a logarithmic scale, beta in [-1, 0], with
    ``dim`` columns. What is found carries over to larger dimensions. Needs optuna.
    """
    try:
        import optuna
    except ImportError:
        raise MissingExtra("optuna", "graphs") from None
    if trials < 1:
        raise GraphError(f"trials = {trials}: at least one is needed")
    graph = as_graph(graph)
    cache: OrderedDict[float, list[NDArray[np.float32]]] = OrderedDict()

    def powers(beta: float) -> list[NDArray[np.float32]]:
        """Normalised third and fourth powers: an embedding is a weighted sum of them."""
        if beta not in cache:
            settings: dict[str, Any] = {"beta": beta, "standardize": False, "keep_powers": False}
            cache[beta] = [
                FastRP(dim, weights=weights, seed=seed, **settings).fit_transform(graph)
                for weights in ((0, 0, 1), (0, 0, 0, 1))
            ]
        cache.move_to_end(beta)
        if len(cache) > _CACHED:
            cache.popitem(last=False)
        return cache[beta]

    def score(trial: Any) -> float:
        weight = trial.suggest_float("weight", 1.0, 64.0, log=True)
        beta = trial.suggest_float("beta", -1.0, 0.0, step=BETA_STEP)
        third, fourth = powers(beta)
        total = third + np.float32(weight) * fourth
        deviation = total.std(axis=0)
        deviation[deviation == 0] = 1
        value = float(objective((total - total.mean(axis=0)) / deviation))
        if not math.isfinite(value):
            raise GraphError(f"the objective is {value} at weight {weight:.3g}, beta {beta:.3g}")
        return value

    sampler = optuna.samplers.TPESampler(seed=seed)
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.optimize(score, n_trials=trials)
    finally:
        optuna.logging.set_verbosity(before)
    best = study.best_params
    return Tuned(
        (0.0, 0.0, 1.0, best["weight"]),
        best["beta"],
        study.best_value,
        tuple((t.params["weight"], t.params["beta"], float(t.value or 0.0)) for t in study.trials),
    )
