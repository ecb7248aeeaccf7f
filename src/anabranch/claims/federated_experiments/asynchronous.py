"""Virtual seconds to an accuracy, on devices of different speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, pstdev
from typing import Any

import numpy as np

from anabranch.claims.base import Measurement
from anabranch.evaluation.plotting import Plot
from anabranch.evaluation.testbeds import digits
from anabranch.federated import DeviceProfile, log_uniform, splits
from anabranch.federated.coordinator import Coordinator
from anabranch.federated.events import Action, Event, Stop
from anabranch.federated.randomness import generator
from anabranch.federated.scheduling import Schedule, View
from anabranch.federated.server import Update
from anabranch.federated.strategies import FedAvg, Strategy
from anabranch.federated.strategies.fedasync import FedAsync
from anabranch.federated.strategies.fedbuff import FedBuff
from anabranch.federated.strategies.fedcompass import FedCompass
from anabranch.federated.strategies.fedfix import FedFix
from anabranch.models.progress import Progress, within

CLIENTS = 10
ALPHA = 0.3
STEPS = 100
"""Of a task; FedCompass gives 20 to 100."""
BATCH = 32
LR = 0.1
TUNED = {"FedAvg": 0.3, "FedAsync": 0.6, "FedBuff, 3": 0.6, "FedFix": 0.6, "FedCompass": 0.3}
"""Local rates on log-uniform devices."""
JITTER = 0.05
TARGET = 0.9
HORIZON = 15.0
"""Virtual seconds, in which a device of mean speed does 1,500 steps."""
LONG_HORIZON = 60.0
"""On log-uniform devices, of which the slowest needs up to 10 seconds for a task."""
SEEDS, LOG_UNIFORM_SEEDS = 3, 5

Curve = Sequence[tuple[float, float]]
"""Seconds and accuracy of each version."""
Seconds = Mapping[str, float]
"""Mean over the seeds, by method."""


def exponential(count: int, seed: int) -> list[DeviceProfile]:
    """Seconds for a task's steps are exponential, 1 on average: a few devices are very slow."""
    drawn = generator("exponential devices", seed).exponential(1.0, count)
    return _devices(np.maximum(drawn, 0.2))


def normal(count: int, seed: int) -> list[DeviceProfile]:
    """They are normal, 1 on average, with a standard deviation of 0.3."""
    drawn = generator("normal devices", seed).normal(1.0, 0.3, count)
    return _devices(np.maximum(drawn, 0.1))


def log_uniform_times(count: int, seed: int) -> list[DeviceProfile]:
    """They are spread evenly over an order of magnitude, 1 to 10; nothing but work takes time."""
    drawn = log_uniform(count, seed, seconds_per_unit=(1 / STEPS, 10 / STEPS))
    return _devices(np.array([device.seconds_per_unit * STEPS for device in drawn]))


Population = Callable[[int, int], list[DeviceProfile]]


def fedfix(seed: int, progress: Progress) -> Measurement:
    """FedFix against FedAvg, FedAsync, and itself without correction."""
    methods = {
        "FedAvg": FedAvg(weighting="uniform"),
        "FedAsync": FedAsync(),
        "FedFix": FedFix(importance="uniform"),
        "FedFix, equal weights": FedFix(weights="equal", importance="uniform"),
    }
    found = _Found()
    _measure(found, methods, exponential, seed, within(progress, 0.0, 0.7))
    del methods["FedFix, equal weights"]
    _measure(found, methods, log_uniform_times, seed, within(progress, 0.7, 1.0))
    seconds, jitter = found.seconds["exponential"], found.jitter["exponential"]
    spread = found.seconds["log_uniform_times"]
    checks = {
        "exponential_0.7_of_fedavg": seconds["FedFix"] <= 0.7 * seconds["FedAvg"],
        "exponential_0.85_of_equal_weights": seconds["FedFix"]
        <= 0.85 * seconds["FedFix, equal weights"],
        "exponential_jitter_0.6_of_fedasyncs": jitter["FedFix"] <= 0.6 * jitter["FedAsync"],
        **_ahead("FedFix", spread),
    }
    return Measurement(
        figures={**checks, **found.figures(), "accuracy_jitter": {"exponential": jitter}},
        holds=all(checks.values()),
        seeds=tuple(range(seed, seed + LOG_UNIFORM_SEEDS)),
        note=_NOTE + " FedFix and FedAvg weigh clients the same here, as the paper's code does; "
        "measured before by examples, where jitter was 0.080 against FedAsync's 0.007.",
        plots=(_plot(found.curves["log_uniform_times"]),),
    )


def fedcompass(seed: int, progress: Progress) -> Measurement:
    """FedCompass against FedAvg, FedAsync and FedBuff."""
    methods = {
        "FedAvg": FedAvg(weighting="uniform"),
        "FedAsync": FedAsync(),
        "FedBuff, 3": FedBuff(size=3),
        "FedCompass": FedCompass(
            importance="uniform", latest_factor=1.2, max_steps=STEPS, min_steps=STEPS // 5
        ),
    }
    found = _Found()
    _measure(found, methods, exponential, seed, within(progress, 0.0, 0.3), only_target=True)
    _measure(found, methods, normal, seed, within(progress, 0.3, 0.6), only_target=True)
    _measure(found, methods, log_uniform_times, seed, within(progress, 0.6, 1.0))
    even, uneven = found.seconds["normal"], found.seconds["exponential"]
    checks = {
        "normal_0.9_of_fedavg": even["FedCompass"] <= 0.9 * even["FedAvg"],
        "exponential_0.7_of_fedavg": uneven["FedCompass"] <= 0.7 * uneven["FedAvg"],
        **_ahead("FedCompass", found.seconds["log_uniform_times"]),
    }
    return Measurement(
        figures={**checks, **found.figures()},
        holds=all(checks.values()),
        seeds=tuple(range(seed, seed + LOG_UNIFORM_SEEDS)),
        note=_NOTE,
        plots=(_plot(found.curves["log_uniform_times"]),),
    )


def _ahead(name: str, seconds: Seconds) -> dict[str, bool]:
    return {
        f"log_uniform_before_{other.lower()}": seconds[name] < seconds[other]
        for other in ("FedAvg", "FedAsync")
    }


_NOTE = (
    f"Time is virtual and exact. A run that never reached {TARGET:.0%} counts as the horizon, "
    f"{HORIZON:g} s or on log-uniform devices {LONG_HORIZON:g} s, which flatters it. Clients weigh "
    "the same everywhere. Exponential and normal times: one local rate for all, 0.1, and 3 seeds. "
    "Log-uniform times, 5 seeds: the best of three rates for each method on seeds 10 and 11 (0.1, "
    "0.3, 0.6), of FedAsync also 0.9 and 0.3 of a reply. The first form of this experiment had "
    "devices with slow links, 50 steps a task and one rate, and asked to be ahead of FedAsync, "
    "which neither FedCompass nor FedFix was; the second left that out."
)


class _Found:
    """The curves of every population, method and seed, and what follows from them."""

    def __init__(self) -> None:
        self.curves: dict[str, dict[str, list[Curve]]] = {}

    @property
    def seconds(self) -> dict[str, Seconds]:
        """To the target, by population."""
        return {
            population: {
                name: round(
                    mean(min(_seconds_to_target(c), _horizon(population)) for c in curves), 2
                )
                for name, curves in methods.items()
            }
            for population, methods in self.curves.items()
        }

    @property
    def jitter(self) -> dict[str, Seconds]:
        """Of the accuracy, by population."""
        return {
            population: {
                name: round(mean(map(_jitter, curves)), 4) for name, curves in methods.items()
            }
            for population, methods in self.curves.items()
        }

    def figures(self) -> dict[str, Any]:
        """For the report."""
        return {
            "mean_seconds_to_90_percent": self.seconds,
            "seconds_to_90_percent_by_seed": {
                population: {
                    name: [
                        None if math.isinf(s := _seconds_to_target(c)) else round(s, 2)
                        for c in curves
                    ]
                    for name, curves in methods.items()
                }
                for population, methods in self.curves.items()
            },
        }


def _measure(
    found: _Found,
    methods: Mapping[str, Strategy],
    population: Population,
    seed: int,
    progress: Progress,
    only_target: bool = False,
) -> None:
    """Every method on every seed. On log-uniform devices always to the target only."""
    tuned = population is log_uniform_times
    seeds = LOG_UNIFORM_SEEDS if tuned else SEEDS
    curves = found.curves[population.__name__] = {name: [] for name in methods}
    for number in range(seeds):
        for index, (name, strategy) in enumerate(methods.items()):
            done = (number * len(methods) + index) / (seeds * len(methods))
            progress(f"{name}, {population.__name__} devices, seed {seed + number}", done)
            curves[name].append(
                _run(
                    strategy,
                    population,
                    seed + number,
                    lr=TUNED[name] if tuned else LR,
                    horizon=_horizon(population.__name__),
                    only_target=tuned or only_target,
                )
            )


def _run(
    strategy: Strategy,
    population: Population,
    seed: int,
    *,
    lr: float,
    horizon: float,
    only_target: bool,
) -> Curve:
    """Until the horizon, or until the target is reached."""
    labels = digits.images()[0].labels.tolist()
    split = splits.dirichlet(labels, CLIENTS, ALPHA, min_size=10, seed=seed)
    model = digits.perceptron(seed)
    until = _Until(strategy.schedule(10**6), horizon)
    measure = digits.watch(model)

    def watch(made: Coordinator) -> Mapping[str, float]:
        figures = measure(made)
        if only_target and figures["accuracy"] >= TARGET:
            until.seconds = made.now()
        return figures

    federation = strategy.simulate(
        model,
        digits.local(lr=lr, batch=BATCH, steps=STEPS),
        digits.sites(split, population(CLIENTS, seed)),
        schedule=until,
        seed=seed,
        watch=watch,
    )
    return [(row["seconds"], row["accuracy"]) for row in federation.run().history]


def _horizon(population: str) -> float:
    return LONG_HORIZON if population == log_uniform_times.__name__ else HORIZON


def _devices(seconds: np.ndarray) -> list[DeviceProfile]:
    return [DeviceProfile(seconds_per_unit=float(s) / STEPS, jitter=JITTER) for s in seconds]


class _Until(Schedule):
    """Another schedule, until a time."""

    def __init__(self, inner: Schedule, seconds: float) -> None:
        self.inner, self.seconds = inner, seconds

    def on(self, event: Event, fed: View) -> Sequence[Action]:
        """Stop at the first event after the time."""
        return [Stop("horizon")] if fed.now() >= self.seconds else self.inner.on(event, fed)

    def group(self, update: Update) -> str:
        """The other's."""
        return self.inner.group(update)

    def admits(self, update: Update) -> bool:
        """The other's."""
        return self.inner.admits(update)

    def settings(self) -> dict[str, Any]:
        """The other's, and the time."""
        return {**self.inner.settings(), "until": self.seconds}

    def state_dict(self) -> dict[str, Any]:
        """The other's."""
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The other's."""
        self.inner.load_state_dict(state)


def _seconds_to_target(curve: Curve) -> float:
    return next((seconds for seconds, accuracy in curve if accuracy >= TARGET), math.inf)


def _jitter(curve: Curve) -> float:
    """Standard deviation of the accuracy over the last 40 % of the time."""
    last = [accuracy for seconds, accuracy in curve if seconds >= 0.6 * HORIZON]
    return pstdev(last) if len(last) > 1 else 0.0


def _plot(curves: Mapping[str, Sequence[Curve]]) -> Plot:
    return Plot(
        "Accuracy over time, first seed",
        "virtual seconds",
        "accuracy on test images",
        {name: [(round(s, 2), round(a, 4)) for s, a in found[0]] for name, found in curves.items()},
        levels={"target": TARGET},
    )
