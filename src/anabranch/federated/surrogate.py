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
from typing import Any, Literal

from anabranch.errors import ConfigurationError
from anabranch.federated.client import Client, ClientContext
from anabranch.federated.clock import DeviceProfile
from anabranch.federated.core import Federation
from anabranch.federated.incidents import Incidents
from anabranch.federated.payload import Payload
from anabranch.federated.runtimes import Simulation, Site
from anabranch.federated.scheduling import Schedule
from anabranch.federated.server import Server, Update

Weights = Literal["counting", "equal"]


@dataclass(frozen=True)
class Plan:
    """What to expect of a schedule.

    ``importance``: the surrogate share of each client, 1 in sum. ``bias``: half the sum of its
    distances from the wanted shares, 0 to 1. ``weights``: of one update of each client; a large one
    means versions that jump. ``arrivals``: updates of each client in a version, on average.
    ``staleness``: mean age of an update, in versions.
    """

    importance: Mapping[str, float]
    bias: float
    weights: Mapping[str, float]
    arrivals: Mapping[str, float]
    versions_per_second: float
    staleness: float


def rounds(
    seconds: Mapping[str, float],
    wanted: Mapping[str, float] | None = None,
    sample: int | None = None,
) -> Plan:
    """``sample`` clients, or everyone, in a version, which waits for the slowest (FedAvg)."""
    p = _checked(seconds, wanted)
    chosen = len(p) if sample is None else sample
    if not 1 <= chosen <= len(p):
        raise ConfigurationError(f"sample is from 1 to the {len(p)} clients, not {chosen}")
    # The slowest of the chosen is the i-th of all in comb(i, chosen - 1) of their sets.
    slowest = math.fsum(
        taken * math.comb(faster, chosen - 1) / math.comb(len(p), chosen)
        for faster, taken in enumerate(sorted(seconds.values()))
    )
    rate = chosen / len(p) / slowest
    return _plan(p, dict.fromkeys(p, rate), 1 / slowest, dict.fromkeys(p, 0.0), "equal")


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
    # One in ``size`` makes a version by its own arrival, which makes it no older.
    ages = {name: max(0.0, taken * versions - 1 / size) for name, taken in seconds.items()}
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


def played(
    schedule: Schedule,
    devices: Mapping[str, DeviceProfile],
    steps: Mapping[str, int],
    wanted: Mapping[str, float] | None = None,
    weights: Weights = "counting",
) -> Plan:
    """What any schedule does, found by playing it without training: for FedCompass and deadlines.

    ``devices`` are the clients'; ``steps`` are those of a task that does not say how many. The
    schedule is used up. Its first half is for getting to know the clients and does not count; nor
    does the last version, which may hold everything that is there.
    """
    p = _checked(dict.fromkeys(devices, 1.0), wanted)
    sites = [Site(name, (), device, examples=1) for name, device in devices.items()]
    server = _Tally()
    federation = Federation(server, _Idle(steps), schedule, Simulation(sites))
    federation.coordinator.state.incidents = _Unheard()  # who is late here is late on purpose
    ends = [row["seconds"] for row in federation.run().history]
    first, last = len(ends) // 2, len(ends) - 1
    if last - first < 1:
        raise ConfigurationError(f"a schedule is played for 4 versions or more, not {len(ends)}")
    counted = [one for version in server.versions[first:last] for one in version]
    duration = ends[last - 1] - ends[first - 1]
    if not duration > 0:
        raise ConfigurationError("these devices take no time, so that nothing can be expected")
    rates, ages = dict.fromkeys(p, 0.0), dict.fromkeys(p, 0.0)
    for name, age in counted:
        rates[name] += 1 / duration
        ages[name] += age
    ages = {name: age / max(1.0, rates[name] * duration) for name, age in ages.items()}
    return _plan(p, rates, (last - first) / duration, ages, weights)


class _Tally(Server):
    """Notes who is in each version, and how old the updates are."""

    def __init__(self) -> None:
        self.versions: list[list[tuple[str, int]]] = []

    def message(self, client: str, kind: str) -> Payload:
        return {}

    def fold(self, acc: Any, update: Update) -> Any:
        return [*(acc or ()), (update.client, update.staleness)]

    def commit(self, acc: Any) -> None:
        self.versions.append(acc)


class _Idle(Client):
    """Says that it did its steps."""

    def __init__(self, steps: Mapping[str, int]) -> None:
        self._steps = steps

    def run(self, ctx: ClientContext, kind: str, payload: Payload) -> tuple[Payload, int]:
        ctx.spend(ctx.work.steps or self._steps[ctx.name])
        return {}, 1


class _Unheard(Incidents):
    """Neither counted nor logged."""

    def record(self, what: str, client: str, message: str) -> None:
        pass


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
    since = {
        n: versions / rate if weights == "counting" and rate else 1.0 for n, rate in rates.items()
    }
    each = {name: p[name] * since[name] for name in p}
    total = math.fsum(rates[name] * each[name] for name in p)
    importance = {name: rates[name] * each[name] / total for name in p}
    updates = math.fsum(rates.values())
    return Plan(
        importance,
        math.fsum(abs(importance[name] - p[name]) for name in p) / 2,
        each,
        {name: rate / versions for name, rate in rates.items()},
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
