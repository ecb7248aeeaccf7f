"""What a schedule makes of the clients' importances, before anything is trained.

Whoever is in more versions counts for more. A run tends to the optimum of the losses weighted by
*surrogate importances*, a client's rate of updates times the weight of each, and not to that of the
importances that were wanted, unless the weights make up for the rates (Fraboni et al. 2023,
section 3)::

    plan = fixed_windows({"fast": 1.0, "slow": 7.0}, window=2.0, weights="equal")
    plan.importance    # {"fast": 0.8, "slow": 0.2}
    plan.bias          # 0.3

Times are constant here: seconds of a client's task, transfers included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from anabranch.errors import ConfigurationError

Weights = Literal["counting", "equal"]


@dataclass(frozen=True)
class Plan:
    """What to expect of a schedule.

    ``importance``: the surrogate share of each client, 1 in sum. ``bias``: half the sum of its
    distances from the wanted shares, 0 to 1. ``weights``: of one update of each client; a large one
    means versions that jump. ``staleness``: mean age of an update, in versions.
    """

    importance: Mapping[str, float]
    bias: float
    weights: Mapping[str, float]
    versions_per_second: float
    staleness: float


def rounds(seconds: Mapping[str, float], wanted: Mapping[str, float] | None = None) -> Plan:
    """Everyone in every version, which takes as long as the slowest (FedAvg)."""
    p = _checked(seconds, wanted)
    slowest = max(seconds.values())
    return _plan(p, dict.fromkeys(p, 1 / slowest), 1 / slowest, dict.fromkeys(p, 0.0), "equal")


def arrivals(
    seconds: Mapping[str, float],
    wanted: Mapping[str, float] | None = None,
    size: int = 1,
    weights: Weights = "counting",
) -> Plan:
    """A version for every ``size`` updates (FedBuff; 1 is FedAsync)."""
    if size < 1:
        raise ConfigurationError(f"size is at least 1 update, not {size}")
    p = _checked(seconds, wanted)
    rates = {name: 1 / taken for name, taken in seconds.items()}
    versions = math.fsum(rates.values()) / size
    # Of the versions made meanwhile, the one that it is in itself makes it no older.
    ages = {name: max(0.0, taken * versions - 1) for name, taken in seconds.items()}
    return _plan(p, rates, versions, ages, weights)


def fixed_windows(
    seconds: Mapping[str, float],
    window: float,
    wanted: Mapping[str, float] | None = None,
    weights: Weights = "counting",
) -> Plan:
    """A version every ``window`` seconds, of whoever has finished by then (FedFix)."""
    if not (window > 0 and math.isfinite(window)):
        raise ConfigurationError(f"window is above 0 seconds and finite, not {window}")
    p = _checked(seconds, wanted)
    windows = {name: math.ceil(taken / window) for name, taken in seconds.items()}
    rates = {name: 1 / (count * window) for name, count in windows.items()}
    ages = {name: count - 1.0 for name, count in windows.items()}
    return _plan(p, rates, 1 / window, ages, weights)


def _plan(
    p: Mapping[str, float],
    rates: Mapping[str, float],
    versions: float,
    ages: Mapping[str, float],
    weights: Weights,
) -> Plan:
    """``rates`` are updates of each client per second, ``ages`` how old each is."""
    if weights not in ("counting", "equal"):
        raise ConfigurationError(f"weights is counting or equal, not {weights!r}")
    since = {n: versions / rate if weights == "counting" else 1.0 for n, rate in rates.items()}
    each = {name: p[name] * since[name] for name in p}
    total = math.fsum(rates[name] * each[name] for name in p)
    importance = {name: rates[name] * each[name] / total for name in p}
    updates = math.fsum(rates.values())
    return Plan(
        importance,
        math.fsum(abs(importance[name] - p[name]) for name in p) / 2,
        each,
        versions,
        math.fsum(rates[name] * ages[name] for name in p) / updates,
    )


def _checked(
    seconds: Mapping[str, float], wanted: Mapping[str, float] | None
) -> Mapping[str, float]:
    """The wanted shares, made 1 in sum; uniform if None."""
    if not seconds:
        raise ConfigurationError("a plan needs the seconds of at least one client's task")
    for name, taken in seconds.items():
        if not (taken > 0 and math.isfinite(taken)):
            raise ConfigurationError(f"{name}: a task takes more than 0 seconds, not {taken}")
    if wanted is None:
        return dict.fromkeys(seconds, 1 / len(seconds))
    if wanted.keys() != seconds.keys():
        apart = ", ".join(sorted(wanted.keys() ^ seconds.keys()))
        raise ConfigurationError(f"wanted and seconds name the same clients, not {apart}")
    for name, share in wanted.items():
        if not (share >= 0 and math.isfinite(share)):
            raise ConfigurationError(f"{name}: an importance is at least 0, not {share}")
    total = math.fsum(wanted.values())
    if not total:
        raise ConfigurationError("at least one client has an importance above 0")
    return {name: share / total for name, share in wanted.items()}
