"""Training networks of point clouds: their objective, budgets, and the settings of the papers.

The loop is the shared trainer's.
"""

from anabranch.training.point_clouds.budget import ProcessorBudget
from anabranch.training.point_clouds.objective import PointCloudRegression, Sample, batched
from anabranch.training.point_clouds.presets import PRESETS, Preset, preset

__all__ = [
    "PRESETS",
    "PointCloudRegression",
    "Preset",
    "ProcessorBudget",
    "Sample",
    "batched",
    "preset",
]
