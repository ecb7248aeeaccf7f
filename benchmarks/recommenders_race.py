"""UltraGCN's time to LightGCN's recall on planted interactions of any size.

Both sides choose rate and batch on a small part of the same generator: the setting that is first at
98 % of what both can reach there. Then LightGCN is trained on all until its validation recall@20
has stopped to rise, and UltraGCN until it has as much. Seconds are processor seconds of the steps
on one thread, and UltraGCN's of the co-occurrence of items, which it needs before; validations are
left out on both sides, and ask 2,000 users.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from anabranch.graphs.recommend import (
    Interactions,
    LightGCN,
    UltraGCN,
    cooccurrence_neighbours,
)
from anabranch.graphs.recommend.data import planted_interactions
from anabranch.graphs.recommend.objective import Validated
from anabranch.graphs.recommend.trained import TrainedRecommender

SMALL = 2_000
"""Users, and items, of the part on which settings are chosen."""
COMMUNITY = 100
"""Items of a community, on average."""
ASKED = 2_000
"""Users of a validation."""
CLOSE = 0.98
"""Share of the recall that both sides reach at which settings race on the small part."""

Setting = dict[str, Any]
LIGHT: Sequence[Setting] = [
    {"lr": lr, "batch": batch, "init": 0.1} for lr in (5e-3, 2e-2) for batch in (2048, 8192)
]
ULTRA: Sequence[Setting] = [
    {"lr": lr, "batch": 1024, "init": init} for lr in (5e-3, 2e-2) for init in (1e-2, 1e-1)
]
MOST_EPOCHS = 40
PATIENCE = {LightGCN: 2, UltraGCN: 8}
"""Epochs without a new best; UltraGCN stays at the popularity ranking for a few at first."""


class _Reached(Exception):
    """A validation has the recall that was asked for."""


def race(
    users: int, items: int, per_user: int, seed: int, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Settings that were chosen, and seconds of both sides to LightGCN's recall, as JSON values."""
    light, ultra = _settings(per_user, seed, say)
    train, validation = _parts(users, items, per_user, seed)
    say(f"{users} users, {items} items, {len(train)} interactions to train on")
    theirs = _curve(LightGCN, light, train, validation, seed)
    target = max(theirs, key=lambda v: v.ranking.recall)
    say(f"LightGCN {light}: recall@20 {target.ranking.recall:.4f} in {_time(target)}")
    began = time.process_time()
    cooccurrence_neighbours(train)
    before = time.process_time() - began
    ours = _curve(UltraGCN, ultra, train, validation, seed, until=target.ranking.recall)
    best = max(ours, key=lambda v: v.ranking.recall)
    say(
        f"UltraGCN {ultra}: recall@20 {best.ranking.recall:.4f} in {_time(best)} and {before:.1f} s"
    )

    def faster(recall: float) -> float | None:
        """LightGCN's seconds to that recall over UltraGCN's; None if that did not reach it."""
        seconds = _seconds(ours, recall) + before
        return round(_seconds(theirs, recall) / seconds, 2) if math.isfinite(seconds) else None

    return {
        "data": {"users": users, "items": items, "train": len(train), "seed": seed},
        "lightgcn": {**light, **_row(target)},
        "ultragcn": {**ultra, **_row(best), "neighbours_seconds": round(before, 1)},
        "times_faster": faster(target.ranking.recall),
        "times_faster_to_98_percent": faster(CLOSE * target.ranking.recall),
    }


def _settings(per_user: int, seed: int, say: Callable[[str], None]) -> tuple[Setting, Setting]:
    """LightGCN's and UltraGCN's, of a race on another draw of the generator."""
    train, validation = _parts(SMALL, SMALL, per_user, seed + 1)
    curves: dict[type[TrainedRecommender], list[list[Validated]]] = {
        model: [_curve(model, setting, train, validation, seed) for setting in settings]
        for model, settings in ((LightGCN, LIGHT), (UltraGCN, ULTRA))
    }
    best = [max(v.ranking.recall for c in found for v in c) for found in curves.values()]
    goal = CLOSE * min(best)
    chosen = []
    for (model, found), settings in zip(curves.items(), (LIGHT, ULTRA), strict=True):
        seconds = [_seconds(curve, goal) for curve in found]
        chosen.append(settings[int(np.argmin(seconds))])
        say(f"{model.__name__}, small part: {min(seconds):.1f} s to {goal:.4f} with {chosen[-1]}")
    return chosen[0], chosen[1]


def _curve(
    model: type[TrainedRecommender],
    setting: Setting,
    train: Interactions,
    validation: Interactions,
    seed: int,
    until: float = math.inf,
) -> list[Validated]:
    """Validations until recall has stopped to rise, or is ``until``."""
    curve: list[Validated] = []

    def note(validated: Validated) -> None:
        curve.append(validated)
        if validated.ranking.recall >= until:
            raise _Reached

    made = model(**setting, epochs=MOST_EPOCHS, patience=PATIENCE[model], seed=seed)
    with contextlib.suppress(_Reached):
        made.fit(train, validation=validation, callback=note)
    return curve


def _parts(users: int, items: int, per_user: int, seed: int) -> tuple[Interactions, Interactions]:
    """Training part, and the validation part of some users."""
    whole = planted_interactions(
        users, items, max(2, items // COMMUNITY), per_user=per_user, spread=1.0, seed=seed
    )
    train, held_out = whole.split("random", 0.2, seed)
    asked = np.random.default_rng(seed).permutation(users)[:ASKED]
    chosen = np.isin(held_out.user, asked)
    validation = Interactions(
        held_out.user[chosen], held_out.item[chosen], users, items, part="validation"
    )
    return train, validation


def _seconds(curve: Sequence[Validated], recall: float) -> float:
    """Until the first validation with that recall."""
    return next((v.processor_seconds for v in curve if v.ranking.recall >= recall), math.inf)


def _row(validated: Validated) -> dict[str, Any]:
    return {
        "recall@20": round(validated.ranking.recall, 4),
        "epochs": validated.epoch,
        "processor_seconds": round(validated.processor_seconds, 1),
    }


def _time(validated: Validated) -> str:
    return f"{validated.epoch} epochs, {validated.processor_seconds:.1f} s"
