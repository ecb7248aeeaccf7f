"""The authors' settings for their benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anabranch.errors import UnknownName
from anabranch.models.geometry.ponita import PonitaConfig
from anabranch.training.options import TrainOptions


@dataclass(frozen=True)
class Preset:
    """A model and how it is trained; ``note`` is what options cannot say."""

    config: Mapping[str, Any]
    epochs: int
    batch: int
    lr: float
    note: str

    def model(self, **features: Any) -> PonitaConfig:
        """The model's configuration, with the channels of your data (``scalars_in=...``)."""
        return PonitaConfig(**{**self.config, **features})

    def training(self, **changes: Any) -> TrainOptions:
        """Options of a run: ten epochs of warm-up, cosine to zero.

        Warm-up, clipping and weight decay are those of ``nbody`` throughout. Give ``steps`` or
        ``epochs`` for a shorter run; the warm-up keeps its share.
        """
        settings: dict[str, Any] = {
            "batch": self.batch,
            "lr": self.lr,
            "weight_decay": 1e-10,
            "warmup": 10 / self.epochs,
            "schedule": "cosine",
            "clip": 0.5,
            "precision": "fp32",
        }
        if not {"steps", "epochs"} & set(changes):
            settings["epochs"] = self.epochs
        return TrainOptions(**{**settings, **changes})


PRESETS: Mapping[str, Preset] = {
    "nbody": Preset(
        {"orientations": 16, "width": 128, "basis": 256, "layers": 5, "vectors_out": 1},
        10_000,
        100,
        1e-3,
        "3,000 systems; random rotation of positions, velocities and targets",
    ),
    "rmd17": Preset(
        {"orientations": 20, "width": 128, "basis": 256, "layers": 5, "pool": "sum"},
        5_000,
        5,
        5e-4,
        "energy plus 500 times the mean squared error of the forces, its negative gradient; width, "
        "basis and layers as for nbody",
    ),
    "mnist": Preset(
        {
            "dimension": 2,
            "orientations": 10,
            "width": 128,
            "basis": 256,
            "layers": 5,
            "scalars_out": 10,
            "pool": "mean",
        },
        50,
        96,
        5e-4,
        "super-pixels; cross-entropy of ten classes; width, basis and layers as for nbody",
    ),
    "qm9": Preset(
        {"orientations": 16, "width": 256, "basis": 256, "layers": 9, "pool": "sum"},
        1_000,
        96,
        5e-4,
        "one target at a time; basis, epochs, batch and rate are this project's, not the authors'",
    ),
}


def preset(name: str) -> Preset:
    """By name; :class:`UnknownName` lists what there is."""
    if name not in PRESETS:
        raise UnknownName("preset", name, PRESETS)
    return PRESETS[name]
