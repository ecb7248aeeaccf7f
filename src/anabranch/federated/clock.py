"""Devices of different speed, and the virtual time that their work takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from anabranch.errors import ConfigurationError
from anabranch.federated.randomness import generator


@dataclass(frozen=True)
class DeviceProfile:
    """How fast a simulated client is.

    ``seconds_per_unit``: per unit of work, by default an optimiser step. ``down_bytes_per_s`` and
    ``up_bytes_per_s`` are seen from the client. ``latency_s`` is paid once a task.
    ``availability`` is the chance to be there when a task comes, ``failure_rate`` the chance to
    lose one half-way. ``jitter`` is the standard deviation of the logarithm of a factor on the
    computation, drawn for each task.
    """

    seconds_per_unit: float = 0.0
    up_bytes_per_s: float = math.inf
    down_bytes_per_s: float = math.inf
    latency_s: float = 0.0
    availability: float = 1.0
    failure_rate: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        for name in ("seconds_per_unit", "latency_s", "jitter"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigurationError(f"{name} is at least 0 and finite, not {value}")
        for name in ("up_bytes_per_s", "down_bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} is above 0, not {getattr(self, name)}")
        for name in ("availability", "failure_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigurationError(f"{name} is from 0 to 1, not {getattr(self, name)}")

    def seconds(self, down: int, units: float, up: int, stretch: float = 1.0) -> float:
        """Virtual duration of a task: latency, payload down, work, payload up (bytes)."""
        return (
            self.latency_s
            + down / self.down_bytes_per_s
            + units * self.seconds_per_unit * stretch
            + up / self.up_bytes_per_s
        )

    def stretch(self, *words: int | str) -> float:
        """This task's factor on the computation; the words say which task it is."""
        if not self.jitter:
            return 1.0
        return float(np.exp(self.jitter * generator("jitter", *words).standard_normal()))


def log_uniform(
    count: int,
    seed: int,
    *,
    seconds_per_unit: tuple[float, float] = (0.01, 0.1),
    bytes_per_s: tuple[float, float] = (1e5, 1e7),
    latency_s: tuple[float, float] = (0.01, 0.1),
) -> list[DeviceProfile]:
    """Devices whose speeds are spread evenly over orders of magnitude; up is a tenth of down.

    Device i is the same whatever ``count`` is.
    """

    def draw(rng: np.random.Generator, name: str, span: tuple[float, float]) -> float:
        low, high = span
        if not 0 < low <= high < math.inf:
            raise ConfigurationError(f"{name} is a span from above 0 upwards, not {span}")
        return float(math.exp(rng.uniform(math.log(low), math.log(high))))

    devices = []
    for index in range(count):
        rng = generator("device", seed, index)
        down = draw(rng, "bytes_per_s", bytes_per_s)
        devices.append(
            DeviceProfile(
                seconds_per_unit=draw(rng, "seconds_per_unit", seconds_per_unit),
                down_bytes_per_s=down,
                up_bytes_per_s=down / 10,
                latency_s=draw(rng, "latency_s", latency_s),
            )
        )
    return devices
