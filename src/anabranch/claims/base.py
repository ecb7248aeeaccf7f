"""What a claim is, and how one is run."""

from __future__ import annotations

import os
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, ClassVar, Literal

from anabranch import registry
from anabranch.errors import UnknownName
from anabranch.evaluation.plotting import Plot
from anabranch.models.progress import Progress, silent

VERSIONS_OF = ("anabranch", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class Measurement:
    """What an experiment found. ``figures`` are plain values: numbers, texts, lists, dicts.

    ``plots`` are drawn by ``anabranch claims report``.
    """

    figures: Mapping[str, Any]
    holds: bool
    seeds: tuple[int, ...]
    note: str = ""
    """What a reader must know to judge the figures, for example why the effect does not show."""
    plots: tuple[Plot, ...] = ()


class Claim(ABC):
    """An experiment: method against baseline, with the threshold fixed beforehand.

    ``id`` is the system's number, ``name`` its slug. ``paper`` is the paper's own figure.
    """

    id: ClassVar[str]
    name: ClassVar[str]
    system: ClassVar[str]
    paper: ClassVar[str]
    baseline: ClassVar[str]
    method: ClassVar[str]
    threshold: ClassVar[str]

    @abstractmethod
    def measure(self, seed: int, progress: Progress) -> Measurement:
        """Run both sides. At most three minutes on two cores."""


@dataclass(frozen=True)
class ClaimResult:
    """A claim's verdict with everything needed to repeat it."""

    id: str
    name: str
    system: str
    paper: str
    baseline: str
    method: str
    threshold: str
    verdict: Literal["holds", "falls short"]
    figures: Mapping[str, Any]
    note: str
    seconds: float
    seeds: tuple[int, ...]
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    finished: str
    """When, ISO 8601 in UTC."""
    plots: tuple[Plot, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether the effect shows."""
        return self.verdict == "holds"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClaimResult:
        """The inverse of :meth:`to_dict`, also after JSON; TypeError or KeyError if it is not."""
        plots = tuple(Plot.from_dict(plot) for plot in values["plots"])
        return cls(**{**values, "seeds": tuple(values["seeds"]), "plots": plots})


def find(name: str) -> type[Claim]:
    """A claim by its id (``S46``) or slug, in any case."""
    claims = registry.available("claims")
    for claim in claims.values():
        if name.lower() in (claim.id.lower(), claim.name.lower()):
            return claim
    raise UnknownName("claim", name, [f"{claim.id} {claim.name}" for claim in claims.values()])


def run_claim(claim: Claim, seed: int = 0, progress: Progress = silent) -> ClaimResult:
    """Measure, and record how and where."""
    began = time.perf_counter()
    measured = claim.measure(seed, progress)
    return ClaimResult(
        id=claim.id,
        name=claim.name,
        system=claim.system,
        paper=claim.paper,
        baseline=claim.baseline,
        method=claim.method,
        threshold=claim.threshold,
        verdict="holds" if measured.holds else "falls short",
        figures=measured.figures,
        note=measured.note,
        seconds=round(time.perf_counter() - began, 1),
        seeds=measured.seeds,
        versions={name: version(name) for name in VERSIONS_OF},
        machine=machine(),
        finished=datetime.now(UTC).isoformat(timespec="microseconds"),
        plots=measured.plots,
    )


def machine() -> dict[str, Any]:
    """Processor, cores, memory and threads of this machine."""
    import psutil
    import torch

    return {
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
    }
