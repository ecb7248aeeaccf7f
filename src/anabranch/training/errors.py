"""What can go wrong in training."""

from __future__ import annotations

from anabranch.errors import AnabranchError


class TrainingError(AnabranchError):
    """Training cannot start or go on."""


class DataError(TrainingError):
    """A row of the data cannot be used; the message names the row and the remedy."""

    exit_code = 2
    status = 400


class CheckpointError(TrainingError):
    """A checkpoint is damaged, or belongs to another run."""


class Diverged(TrainingError):
    """Losses or gradients were not finite several steps in a row."""
